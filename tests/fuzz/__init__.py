"""Fuzzing: random and malicious inputs for everything that reads what others wrote.

`python -m tests.fuzz` runs any number of inputs (see __main__.py); test_small.py runs a few of each in CI;
test_findings.py holds what was found, one regression test for each.
"""
