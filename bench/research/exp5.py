"""Codec choice for the hot path: frames (block-relative RoPE), page DCT with classes of frequencies, grouping, rotated mean, page gain, ring."""
import sys, os, json, time, traceback; T0 = time.time(); HERE = os.path.dirname(os.path.abspath(__file__)); sys.path.insert(0, HERE)
import numpy as np, torch
from lab import *
OUT = os.environ.get("OUT", "/tmp/out"); os.makedirs(OUT, exist_ok=True); TINY = "--tiny" in sys.argv; LIM = float(os.environ.get("LIM", 400)); PG = 16
tok = dict(np.load(HERE + "/tokens.npz")); RES = []
C16 = [[i] for i in range(16)]; C4b = [[0, 1], [2, 3], [4, 5, 6, 7], list(range(8, 16))]; C5 = [[0], [1], [2, 3], [4, 5, 6, 7], list(range(8, 16))]; C3 = [[0], [1, 2, 3], list(range(4, 16))]; C4 = [[0], [1], [2, 3, 4], list(range(5, 16))]
def dct(n):
    k = torch.arange(n, device=DEV).float(); M = torch.cos(math.pi * (k[None] + .5) * k[:, None] / n) * math.sqrt(2 / n); M[0] /= math.sqrt(2); return M
def relpos(pos, B):
    if B is None: return pos
    if B == 1: return pos * 0
    return pos % B - B // 2
def trig(m, p): a = p.double()[:, None] * m.inv; a = torch.cat([a, a], -1); return a.cos().float(), a.sin().float()
def stats(m, wins, span, seed=3):
    """Pre-RoPE rows and gradients; each window gets a random offset below span (statistics only: attention is relative)."""
    st = Stats(m, wins, local=False); g = torch.Generator().manual_seed(seed); off = torch.randint(0, max(1, span - st.T + 1), (st.n // st.T,), generator=g).to(DEV)
    off = off // PG * PG; st.pos = (off[:, None] + torch.arange(st.T, device=DEV)).flatten(); del st.X["post"], st.g["post"]; return st
def fr(m, st, which, l, B, mean=None):
    x = (st.X if which == "X" else st.g)["pre"][l]
    if mean is not None: x = x - mean
    if B == 1: return x
    cs = trig(m, relpos(st.pos, B)); cs = (cs[0][:, None], cs[1][:, None]); return rot(x.view(-1, m.H, m.d), cs).reshape(-1, m.D)
class U: pass
GRP = [1]
def fit(m, st, B=None, kv=True, groups=1, rotmean=False, ridge=.01, D=PG, sub=32768):
    us = []; idx = (torch.arange(0, st.n // PG, max(1, st.n // sub), device=DEV)[:, None] * PG + torch.arange(PG, device=DEV)).flatten(); Dm = dct(D)
    hg = m.H // groups
    for l in range(m.L):
        pm = st.X["pre"][l].mean(0) if rotmean else None
        K, gK = fr(m, st, "X", l, B, pm), fr(m, st, "g", l, B); V, gV = st.X["V"][l], st.g["V"][l]
        for gi in range(groups):
            cols = slice(gi * hg * m.d, (gi + 1) * hg * m.d)
            for kinds in (("KV",) if kv else ("K", "V")):
                u = U(); u.l, u.kinds, u.heads, u.pm, u.B = l, kinds, range(gi * hg, (gi + 1) * hg), None if pm is None else pm, B
                x = torch.cat([(K if k == "K" else V)[:, cols] for k in kinds], -1); g = torch.cat([(gK if k == "K" else gV)[:, cols] for k in kinds], -1)
                u.mean = x.mean(0)
                if rotmean and "K" in kinds: u.mean[: hg * m.d] = 0
                with hp():
                    M = .5 * (g.T @ g).double() / len(g); y = x - u.mean; Cv = (y.T @ y).double() / len(y)
                h = M.shape[0] // len(kinds); M = M + ridge * torch.diag(M.diagonal().view(len(kinds), h).mean(1).repeat_interleave(h))
                e, d, var = basis(Cv, M); u.enc, u.dec = e.float(), d.float()
                with hp(): z = y[idx] @ u.enc
                u.z = z; u.std0 = z.pow(2).mean(0).sqrt().clamp_min(1e-12)
                u.y = torch.einsum("fp,npr->nfr", Dm, z.view(-1, D, z.shape[1])); us.append(u)
    return us
def lloyd1(x, b, it=40):
    x = x.sort().values; tot = torch.cat([x.new_zeros(1, dtype=torch.float64), x.double().cumsum(0)]); st_ = {1: 1.596, 2: .996, 3: .586, 4: .335, 6: .104, 8: .0308}[b]
    lv = (torch.arange(2 ** b, device=x.device) + .5 - 2 ** (b - 1)) * st_
    for _ in range(it):
        c = torch.searchsorted(x, ((lv[1:] + lv[:-1]) / 2).contiguous()); c = torch.cat([c.new_zeros(1), c, c.new_full((1,), len(x))]); n = (c[1:] - c[:-1]).double(); mu = (tot[c[1:]] - tot[c[:-1]]) / n.clamp_min(1)
        lv = torch.where(n > 0, mean_(mu), lv).sort().values
    return lv
def mean_(x): return x.float()
def near(x, lv): return lv[torch.searchsorted(((lv[1:] + lv[:-1]) / 2).contiguous(), x.contiguous())]
def i8tab(lv): s = lv.abs().max() / 127; return (lv / s).round() * s
def best_uni(x, b):
    best = (9e9, None)
    for mlt in np.geomspace(.5, 3, 40):
        lv = (torch.arange(2 ** b, device=x.device) + .5 - 2 ** (b - 1)) * GT[b][0] * float(mlt); er = (x[:400000] - near(x[:400000], lv)).pow(2).mean().item(); best = min(best, (er, lv), key=lambda t: t[0])
    return best[1]
def tables(us, classes, quant="shape", gain=False, dom="z"):
    pool = torch.cat([((u.z[::7] / u.std0) if dom == "z" else (u.y / u.y.pow(2).mean(0).sqrt().clamp_min(1e-12)).flatten(0, 1)[::7])[:, : u.z.shape[1] // 2].flatten()[::5] for u in us])[:3000000]
    if gain: pool = torch.cat([((u.y / u.y.pow(2).mean(0).sqrt().clamp_min(1e-12)) / gains(u, u.y)[:, None, None]).flatten(0, 1)[::7][:, : u.z.shape[1] // 2].flatten()[::5] for u in us])[:3000000]
    tab = {b: lloyd1(pool, b) for b in WIDTHS if b}
    if quant == "mix": tab = {b: (i8tab(v) if b <= 4 else best_uni(pool, b)) for b, v in tab.items()}
    if quant == "i8": tab = {b: i8tab(v) for b, v in tab.items()}
    if quant == "gauss": tab = {b: (torch.arange(2 ** b, device=DEV) + .5 - 2 ** (b - 1)) * GT[b][0] for b in WIDTHS if b}
    for u in us:
        gn = gains(u, u.y)[:, None, None] if gain else None; er = []; sd = []
        for c in classes:
            y = u.y[:, c]; yn = y / gn if gain else y; s = yn.pow(2).mean((0, 1)).sqrt().clamp_min(1e-12); sd.append(s); rows = [y.pow(2).mean(0).sum(0)]
            for b in WIDTHS[1:]: q = near(yn / s, tab[b]) * s; rows.append(((y - (q * gn if gain else q)).pow(2)).mean(0).sum(0))
            er.append(torch.stack(rows))
        u.sd, u.er = torch.stack(sd), torch.stack(er, 1) / len([f for c in classes for f in c])     # [nb, classes, R] nats a token
    return tab
def gains(u, y):
    s = u.gs if hasattr(u, "gs") else u.y.pow(2).mean(0).sqrt().clamp_min(1e-12); u.gs = s; r = max(8, y.shape[-1] // 4)
    g = (y / s)[..., :r].pow(2).mean((-1, -2)).sqrt().clamp_min(.02); return torch.exp((g.log() * 8).round() / 8)
def assign(us, classes, bits):
    [delattr(u, "er0") for u in us if hasattr(u, "er0")]
    if GRP[0] > 1:
        for u in us:
            u.er0 = u.er; R = u.er.shape[2]; g = GRP[0]; u.er = F.pad(u.er, (0, -R % g)).unflatten(2, (-1, g)).mean(3).repeat_interleave(g, 2)[..., :R]
    err = torch.cat([u.er.flatten(1) for u in us], 1).double(); n = torch.cat([torch.tensor([float(len(c)) for c in classes], device=DEV)[:, None].expand(-1, u.er.shape[2]).flatten() for u in us]).double()
    P = sum(len(c) for c in classes); w = torch.tensor(WIDTHS, device=DEV).double()[:, None] * n / P; lo, hi = -60., 20.
    for _ in range(70):
        mid = (lo + hi) / 2; ix = (err + math.exp(mid) * w).argmin(0)
        if w.gather(0, ix[None]).sum() > bits: lo = mid
        else: hi = mid
    ix = (err + math.exp(hi) * w).argmin(0); used = w.gather(0, ix[None]).sum().item(); wt = torch.tensor(WIDTHS, device=DEV)[ix]
    for u, b, i, e in zip(us, wt.split([u.er[0].numel() for u in us]), ix.split([u.er[0].numel() for u in us]), err.split([u.er[0].numel() for u in us], 1)):
        u.bits = b.view(len(classes), -1); u.er = getattr(u, "er0", u.er); u.pred = e.gather(0, i[None]).sum().item()
    return used
class Codec5:
    def __init__(s, m, us, tab, classes, gain=False, D=PG): s.m, s.us, s.tab, s.c, s.gain, s.D, s.Dm = m, {}, tab, classes, gain, D, dct(D); [s.us.setdefault(u.l, []).append(u) for u in us]
    def q(s, u, z):
        T = z.shape[0]; y = torch.einsum("fp,npr->nfr", s.Dm, z.view(-1, s.D, z.shape[1])); gn = gains(u, y)[:, None, None] if s.gain else 1.; y = y / gn; o = torch.zeros_like(y)
        for i, c in enumerate(s.c):
            x = y[:, c] / u.sd[i]; r = torch.zeros_like(x)
            for b, lv in s.tab.items():
                sel = (u.bits[i] == b).nonzero()[:, 0]
                if len(sel): r[..., sel] = near(x[..., sel], lv)
            o[:, c] = r * u.sd[i]
        return torch.einsum("fp,nfr->npr", s.Dm, o * gn).reshape(T, -1)
    def __call__(s, l, kp, k, v, cs, ids):
        m = s.m; T = k.shape[2]; pos = torch.arange(T, device=DEV); kh, vh = torch.zeros_like(k[0]), torch.zeros_like(v[0])
        for u in s.us[l]:
            hs = list(u.heads); rp = relpos(pos, u.B); c = trig(m, rp); back = trig(m, pos - rp); parts = []
            for kd in u.kinds:
                if kd == "K":
                    x = kp[0, hs]
                    if u.pm is not None: x = x - u.pm.view(m.H, 1, m.d)[hs]
                    parts.append(rot(x, c).transpose(0, 1).reshape(T, -1))
                else: parts.append(v[0, hs].transpose(0, 1).reshape(T, -1))
            x = torch.cat(parts, -1); Tp = (T + PG - 1) // PG * PG; x = F.pad(x, (0, 0, 0, Tp - T)); r = (s.q(u, (x - u.mean) @ u.enc) @ u.dec + u.mean)[:T]
            for kd, y in zip(u.kinds, r.split(len(hs) * m.d, -1)):
                y = y.view(T, len(hs), m.d).transpose(0, 1)
                if kd == "K":
                    y = rot(y, back)
                    if u.pm is not None: y = y + rot(u.pm.view(m.H, 1, m.d)[hs], trig(m, pos))
                    kh[hs] = y
                else: vh[hs] = y
        return kh[None], vh[None]
class Ev(Eval):
    def __init__(s, m, T, per, names, start=256):
        s.m, s.T, s.start, s.win = m, T, start, []
        for n in names:
            k = [x for x in tok if x.startswith("ev_") and n in x][0]; t = torch.from_numpy(tok[k].astype(np.int64)); step = (len(t) - T) // max(per, 1)
            for i in range(per): s.win.append((n, t[i * step + step // 3:][:T].to(DEV)))
        with torch.inference_mode(): s.ref = [forward(m, w[None])[0] for _, w in s.win]
def i8g(x, g=32): y = x.unflatten(-1, (-1, min(g, x.shape[-1]))); a = y.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127; return ((y / a).round() * a).flatten(-2)
import lab; lab.i8 = i8g
class Stop(Exception): pass
def go(tag, us, classes, xs, W=112, eb=8.5, quant="shape", gain=False, dom="z", D=PG):
    tab = tables(us, classes, quant, gain, dom); WINQ[0] = eb < 16
    for x in xs:
        if time.time() - T0 > LIM: raise Stop()
        b = code_bits(m, x, W, PG, CTX, eb) * m.E - (len(us) * 8 / PG if gain else 0); n = assign(us, classes, b); t = time.time(); r = ev(Codec5(m, us, tab, classes, gain, D), W, PG)
        rk = np.mean([(u.bits > 0).float().mean(1).cpu().numpy() for u in us], 0).round(2).tolist() if len(classes) <= 5 else 0
        r.update(model=mname, name=tag, req=x, bits=n / m.E, W=W, eb=eb, pred=sum(u.pred for u in us)); RES.append(r)
        print(f"{mname} {tag:34s} {x:4}x W{W}/{eb} kl {r['kl']:.5f} p99 {r['p99']:.3f} t1 {100*r['top1']:.1f} ppl {r['ppl']:.3f}/{r['ppl0']:.3f} pred {r['pred']:.5f} rk {rk} [{time.time()-T0:.0f}]", flush=True)
    json.dump(RES, open(OUT + "/exp5.json", "w"))
def main(xs, full):
    X4 = xs; us = fit(m, st, 512); go("rel512 KV C5", us, C5, [3.5, 4, 5, 6, 8, 10, 16]); go("rel512 KV C4b", us, C4b, X4); go("rel512 KV C5 mix", us, C5, X4, quant="mix"); go("rel512 KV C5 gain", us, C5, X4, gain=True)
    for g in (8, 16, 32): GRP[0] = g; go(f"rel512 KV C5 mix grp{g}", us, C5, X4, quant="mix"); go(f"rel512 KV C4b mix grp{g}", us, C4b, X4, quant="mix")
    GRP[0] = 1
    go("rel512 KV C5 gauss-uniform", us, C5, X4, quant="gauss"); go("rel512 KV C5 W176", us, C5, X4, W=176); go("rel512 KV C5 W80", us, C5, X4, W=80)
    go("rel512 KV C5 rotmean", fit(m, st, 512, rotmean=True), C5, X4); go("rel2048 KV C5", fit(m, st, 2048), C5, X4)
    go("rel512 K|V C5", fit(m, st, 512, kv=False), C5, X4); go("rel512 KV perhead C5", fit(m, st, 512, groups=m.H), C5, X4)
    for r in (.003, .03): go(f"rel512 KV C5 ridge{r}", fit(m, st, 512, ridge=r), C5, X4)
    if mname != "lab":
        go("rel512 KV 2 groups C5", fit(m, st, 512, groups=2), C5, X4)
        go("pre KV C5", fit(m, st, 1), C5, X4); go("post KV C5", fit(m, st, None), C5, X4); go("post KV C5 rotmean", fit(m, st, None, rotmean=True), C5, X4); go("pre K|V C5", fit(m, st, 1, kv=False), C5, X4); go("post K|V C5", fit(m, st, None, kv=False), C5, X4)
        go("rel512 KV noDCT", fit(m, st, 512, D=1), [[0]], X4, D=1)
        return
    full_g = {w: [g.clone() for g in st.g[w]] for w in ("pre", "V")}
    for keep in (32, 8):
        n = st.T * keep
        for w in ("pre", "V"): st.g[w] = [torch.cat([g[:n], torch.zeros_like(g[n:])]) for g in full_g[w]]
        go(f"rel512 KV C5 fisher {n}", fit(m, st, 512), C5, X4)
    for w in ("pre", "V"): st.g[w] = full_g[w]
CTX = 4096
for mname, path in (("lab", HERE + "/lab"), ("second", HERE + "/second")):
    try:
        m = Model(path)
        if TINY: m.L = 2; m.E = 2 * m.L * m.D
        TE = 512 if TINY else (4096 if mname == "lab" else 2048); CTX = TE if TINY else 4096
        ev = Ev(m, TE, 1 if TINY else 2, ("wikitext2", "rust") if TINY else ("wikitext2", "rust", "openstax", "eltec"), 64 if TINY else 256)
        st = stats(m, cal_windows(tok, 256 if TINY else 1024, 4000 if TINY else 131072), 8192); print(mname, "ready", time.time() - T0, flush=True)
        main([8] if TINY else [4, 8, 16], True)
    except Stop: print("TIME", mname)
    except Exception: traceback.print_exc()
    LIM += float(os.environ.get("LIM2", 0))
print("done", time.time() - T0)
