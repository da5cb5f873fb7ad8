"""Left over of exp5 on the second model, and the ring's own cost."""
import sys; sys.argv = ["x"]
src = open(__file__.replace("exp6", "exp5")).read().split("CTX = 4096\n")[0]; exec(src)
LIM = 1e9; CTX = 4096
import os
mname = os.environ["M"]; m = Model(HERE + "/" + mname); TE = 2048; ev = Ev(m, TE, 1, ("wikitext2", "rust", "openstax"))
def ring(name, f):
    lab.i8 = f; WINQ[0] = True; r = ev(lambda l, kp, k, v, cs, ids: (k, v), 112, PG); print(mname, "ring only", name, f"{r['kl']:.6f}", flush=True); lab.i8 = i8g; WINQ[0] = False
def q(bits, g):
    def f(x):
        y = x.unflatten(-1, (-1, min(g, x.shape[-1]))); n = 2 ** (bits - 1) - 1; a = y.abs().amax(-1, keepdim=True).clamp_min(1e-9) / n; return ((y / a).round() * a).flatten(-2)
    return f
ring("bf16", lambda x: x.bfloat16().float())
for b, g in ((8, 128), (8, 32), (8, 16), (10, 32)): ring(f"int{b} g{g}", q(b, g))
if mname == "second":
    st = stats(m, cal_windows(tok, 1024, 65536), 8192); X = [4, 8, 16]
    go("rel512 KV C5", fit(m, st, 512), C5, X); go("rel512 KV C5 rotmean", fit(m, st, 512, rotmean=True), C5, X); go("rel512 K|V C5", fit(m, st, 512, kv=False), C5, X); go("rel512 KV perhead C5", fit(m, st, 512, groups=m.H), C5, X); go("rel512 KV 2 groups C5", fit(m, st, 512, groups=2), C5, X)
    go("pre KV C5", fit(m, st, 1), C5, X); go("post KV C5", fit(m, st, None), C5, X); go("post K|V C5", fit(m, st, None, kv=False), C5, X); go("rel512 KV noDCT", fit(m, st, 512, D=1), [[0]], X, D=1)
