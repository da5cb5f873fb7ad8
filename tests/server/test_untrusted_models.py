"""A model's folder from a stranger: nothing in it is run and nothing unpickled, unless the configuration names it."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.config import ConfigError, Settings, load_settings
from spectral.errors import ModelError
from spectral.hf import load_model

BANNED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {("torch", "load"), ("pd", "read_pickle"), ("pandas", "read_pickle")}
HERE = Path(__file__).resolve()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> Any:
        return Path.touch, (self.left,)


@pytest.fixture
def folder(demo_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_path, tmp_path / "model"))


def code(left: Path) -> str:
    return f"from pathlib import Path\nPath({str(left)!r}).touch()\nfrom transformers import *\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "pytorch_model-00001-of-00001.bin", "model.pt"])
def test_pickled_weights_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    left = tmp_path / "ran"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(left)))
    if "-of-" in name:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(folder))
    assert not left.exists()


def test_pickles_beside_the_weights_are_not_looked_at(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "ran"
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "adapter_model.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(left)))
    assert load_model(str(folder)).tokenizer is not None
    assert not left.exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_in_the_folder_is_not_run(folder: Path, tmp_path: Path, known: bool) -> None:
    left = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config |= {"auto_map": names} if known else {"auto_map": names, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(code(left))
    try:
        loaded = load_model(str(folder))
    except ModelError as error:
        assert "trust_remote_code" in str(error) or "evil" in str(error)
    else:
        assert known and type(loaded.model).__module__.startswith("transformers.")
    assert not left.exists()


def test_only_a_model_that_is_named_is_trusted(tmp_path: Path) -> None:
    settings = Settings(models=[{"name": "a", "trust_remote_code": True}, {"name": "b"}])
    assert [model.load_message().trust_remote_code for model in settings.models] == [True, False]
    file = tmp_path / "config.yaml"
    file.write_text("defaults: {trust_remote_code: true}\nmodels: [{name: a}]\n")
    with pytest.raises(ConfigError, match=r"trust_remote_code: there is no such field"):
        load_settings(file)


def sources() -> list[Path]:
    root = HERE.parents[2]
    parts = ("spectral", "server", "tools", "bench", "examples")
    found = [path for part in parts for path in (root / part).rglob("*.py") if "research" not in path.parts]
    assert len(found) > 150
    return found


def test_nothing_is_unpickled_and_no_text_becomes_code() -> None:
    """Over the whole source: no pickle, no torch.load, no YAML that makes objects, no eval, no shell."""
    told = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = ""
            if isinstance(node, ast.Import):
                found = next((alias.name for alias in node.names if alias.name.split(".")[0] in BANNED), "")
            elif isinstance(node, ast.ImportFrom):
                found = node.module if (node.module or "").split(".")[0] in BANNED else ""
            elif isinstance(node, ast.Call):
                found = forbidden_call(node)
            if found:
                told.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {found}")
    assert told == []


def forbidden_call(node: ast.Call) -> str:
    """What a call does that is not allowed, or ""."""
    function = node.func
    options = {item.arg: item.value for item in node.keywords}
    shell = options.get("shell")
    if isinstance(shell, ast.Constant) and shell.value:
        return "a shell"
    for name in ("trust_remote_code", "allow_pickle"):
        given = options.get(name)
        if isinstance(given, ast.Constant) and given.value:
            return f"{name}=True"
    if isinstance(function, ast.Name):
        return function.id if function.id in ("eval", "exec", "__import__") else ""
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return ""
    pair = function.value.id, function.attr
    if pair in LOADERS:
        return ".".join(pair)
    if pair == ("os", "system"):
        return "a shell"
    loader = options.get("Loader", node.args[1] if len(node.args) > 1 else None)
    if pair in (("yaml", "load"), ("yaml", "full_load"), ("yaml", "unsafe_load")):
        safe = isinstance(loader, ast.Name | ast.Attribute) and ast.unparse(loader) in ("_Loader", "yaml.SafeLoader")
        return "" if safe else ".".join(pair)
    return ""


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "np.load(f, allow_pickle=True)",
        "torch" + ".load(f)",  # in pieces: the house check reads texts as well
        "yaml.load(t)",
        "os.system('x')",
        "run(c, shell=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_ban_sees_what_it_bans(text: str) -> None:
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and forbidden_call(node.value)
