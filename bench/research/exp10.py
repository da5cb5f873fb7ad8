"""A faster coder for the small level of the cold tier: predictions in bf16, ranks by packed byte. A prototype.

    python bench/research/exp10.py MODEL PROFILE TEXT_FOLDER CALIBRATION_FOLDER [--settings 8x] [--sources 1,2] [--json FILE]

Pages are turned over (bytes by pages), so that the fields of a plane are a matrix of features as they lie. One bf16
product a class predicts all codes of it from the layers below; its sums are whole numbers of one unit and below 2^24, so
exact, and rounding them to bf16 leaves the bin in the low bits. Predictions are packed as the codes are, and one look-up
by (predicted byte, byte) gives the rank of the byte among all 256, which zstd's Huffman stage takes. What comes back is
compared with the pages. Speeds are by processor time of one thread. See docs/cold-tier.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cold_tier import pages_of, text_windows

import spectral.link_fit
import spectral.linked
from spectral import SpectralProfile
from spectral.hf import load_model
from spectral.layout import quarter_nbytes
from spectral.link_fit import fit_links
from spectral.provenance import provenance

torch.set_num_threads(1)
SCALE={1:4.0,2:1/.6,4:5.0,8:10.0}; OFFSET={1:128.5,2:129.5,4:135.5,8:191.5}; TOP={1:129,2:131,4:143,8:255}
DT=torch.bfloat16
def bits16(x): return int(torch.tensor(float(x)).bfloat16().view(torch.int16))
class Part:
    """runs of one width in one strip of one unit"""
    def __init__(s,unit,base,lat0,strip,runs,width):
        s.bits,s.cls,s.rows,s.width=strip.bits,strip.number,strip.rows,width
        s.q=quarter_nbytes(s.bits); s.runs=runs
        nb=s.rows*s.q*4  # bytes per cell
        idx=np.concatenate([np.arange(base+strip.start+j*nb,base+strip.start+(j+1)*nb) for j in runs])
        s.n_bytes=len(idx)
        s.sl=slice(int(idx[0]),int(idx[-1])+1) if (np.diff(idx)==1).all() else None
        s.idx=torch.from_numpy(idx)
        # latents [fields per byte][cell, quarter, q]
        per=8//s.bits
        lat=np.full((per,len(runs),4,s.q),-1)
        for a,j in enumerate(runs):
            for t in range(4):
                for k in range(s.q):
                    for i in range(per):
                        if s.bits==1:
                            r=2*j+i//4
                            if r<len(strip.runs): lat[i,a,t,k]=strip.runs[r]+4*t+i%4
                        else: lat[i,a,t,k]=strip.runs[j]+4*t+k*per+i
        s.lat=np.where(lat>=0,lat+lat0,-1).reshape(per,-1); s.per=per
        s.shift=0
    def read(s,T):
        x=T[s.sl] if s.sl is not None else T.index_select(0,s.idx)
        n=T.shape[1]
        if s.q==1: return x.reshape(-1,s.rows*n)
        return x.view(-1,s.rows,s.q,n).transpose(1,2).reshape(-1,s.rows*n)
    def write(s,T,x):
        n=T.shape[1]
        if s.q>1: x=x.view(-1,s.q,s.rows,n).transpose(1,2).reshape(-1,n)
        else: x=x.reshape(-1,n)
        if s.sl is not None: T[s.sl]=x
        else: T.index_copy_(0,s.idx,x)
class LayerCoder:
    def __init__(s,codec):
        s.codec=codec; s.parts=[]; lat0=0
        W=np.concatenate([u.layout.widths for u in codec.units],1); s.W=W
        s.dev=np.concatenate([u.deviation.numpy()[[0,1,2,4,8]] for u in codec.units],1)
        s.step=np.array([[codec.units[0].steps.get(int(w),0.) for w in row] for row in W]); s.zero=(2.**W-1)/2
        for u,start in zip(codec.units,codec.starts):
            for strip in u.layout.strips:
                if strip.bits==1: groups={0:list(range(strip.cells))}
                else:
                    groups={}
                    for j,r in enumerate(strip.runs): groups.setdefault(int(u.layout.widths[strip.number,r]),[]).append(j)
                for w,runs in groups.items():
                    p=Part(u,start,lat0,strip,runs,w)
                    p.shift=2 if (w==6 and strip.bits==4) else 0
                    p.strip=strip; p.first=start+strip.start
                    s.parts.append(p)
            lat0+=u.rank
        s.R=lat0
        s.parts.sort(key=lambda p:(p.cls,p.bits))
        # low parts of 3 bits know where their high ones are
        ones={(p.cls):p for p in s.parts if p.bits==1}
        for p in s.parts:
            if p.bits==2 and p.width==3:
                one=ones[p.cls]; rows=[]; odd=[]
                for j in p.runs:
                    i=one.strip.runs.index(p.strip.runs[j])
                    rows+= [one.first+((i//2)*4)*p.rows + k for k in range(4*p.rows)]; odd+=[i%2]*(4*p.rows)
                p.hi_rows=torch.tensor(rows); p.hi_shift=torch.tensor(odd,dtype=torch.uint8)[:,None]*4
        s.classes=[[p for p in s.parts if p.cls==c] for c in range(5)]
        s.src=[[p for p in s.classes[c] if not(p.width==6 and p.bits==2)] for c in range(5)]
        s.lat=[np.concatenate([p.lat.reshape(-1) for p in s.src[c]]) if s.src[c] else np.zeros(0,int) for c in range(5)]
        mult=[]
        for c in range(5):
            m=[]
            for p in s.src[c]:
                l=p.lat.reshape(-1)
                if p.bits==1: m.append(np.where(l>=0,np.where(W[c,np.maximum(l,0)]==3,4.,1.),0.))
                else: m.append(np.full(len(l),2.**p.shift))
            mult.append(np.concatenate(m) if m else np.zeros(0))
        s.mult=mult
    def features(s,T):
        n=T.shape[1]; out=[]
        for c in range(5):
            K=len(s.lat[c])
            rows=(1,1,2,4,8)[c]
            B=torch.empty((K+3,rows*n),dtype=DT); at=0; F=B[:K]; B[K]=1; B[K+1]=256; B[K+2]=65536
            for p in s.src[c]:
                x=p.read(T); b=p.bits
                if b==8: F[at:at+len(x)]=x; at+=len(x); continue
                m=2**b-1
                for i in range(p.per):
                    y=x if i==0 else x>>(b*i)
                    if i<p.per-1: y=y&m
                    F[at:at+len(x)]=y; at+=len(x)
            out.append(B)
        return out
    def link(s,link,sources):
        """matrices per class"""
        s.mat=[]; s.targets=[]
        if link is None: return
        weight=link.weight.numpy().astype(np.float64); gain=link.gain.numpy().astype(np.float64)
        off=np.cumsum([0]+[x.R for x in sources])
        for c in range(5):
            tg=[p for p in s.classes[c] if not(p.width==6 and p.bits==2)]
            lat=np.concatenate([p.lat.reshape(-1) for p in tg]) if tg else np.zeros(0,int)
            sc=np.concatenate([np.full(p.lat.size,SCALE[p.bits]) for p in tg]) if tg else np.zeros(0)
            of=np.concatenate([np.full(p.lat.size,OFFSET[p.bits]) for p in tg]) if tg else np.zeros(0)
            g=np.where(lat>=0,gain[c,np.maximum(lat,0)],0)*sc*4
            M=[];bias=np.zeros(len(lat))
            for x,o in zip(sources,off):
                l=x.lat[c]; unit=x.step[c]*x.dev[c] # [R]
                w=weight[o:o+x.R]
                M.append(np.where(l>=0,unit[np.maximum(l,0)]*x.mult[c],0)[:,None]*w[np.maximum(l,0)][:,lat]*g)
                used=x.W[c]>0
                z=x.zero[c].copy(); z[x.W[c]==6]-=1.5 # the low plane of six bits is not read: its mean
                bias-=((unit*z*used)[:,None]*w[:,lat]*g).sum(0)
            M=np.concatenate(M) if M else np.zeros((0,len(lat)))
            if not len(lat): s.mat.append(None); s.targets.append(tg); continue
            big=max(np.abs(M).max() if M.size else 1e-9,1e-9); e=np.floor(np.log2(255/big)); e=min(e,12); u=2.**-e
            Q=np.round(M/u); b=np.round((bias+of)/u)
            sg=np.sign(b); a=np.abs(b); assert a.max()<2**24
            dig=np.stack([sg*(a%256),sg*((a//256)%256),sg*(a//65536)])
            full=torch.from_numpy(np.concatenate([Q,dig])*u).to(DT)
            assert (full.double().numpy()==np.concatenate([Q,dig])*u).all()
            s.mat.append(full.T.contiguous()); s.targets.append(tg)
    def predict(s,F,c,n):
        tg=s.targets[c]
        if s.mat[c] is None: return []
        S=n*(1,1,2,4,8)[c]
        X=F[0][c] if len(F)==1 else torch.cat([*(f[c][:-3] for f in F[:-1]),F[-1][c]])
        if S<=640: O=s.mat[c]@X
        else:
            O=torch.empty((s.mat[c].shape[0],S),dtype=DT)
            for a in range(0,S,512): O[:,a:a+512]=s.mat[c]@X[:,a:a+512]
        O=O.view(torch.int16); out=[];at=0
        for p in tg:
            k=p.lat.shape[1]
            o=O[at:at+p.per*k].clamp_(bits16(128),bits16(TOP[p.bits])).view(p.per,k,S); at+=p.per*k
            o=o.to(torch.uint8)
            if p.bits==8: P=o[0]&127
            else:
                m=2**p.bits-1; P=o[0]&m
                for i in range(1,p.per): P=P|((o[i]&m)<<(p.bits*i))
            out.append(P)
        return out
    def mask(s,p,T):
        h=(T.index_select(0,p.hi_rows)>>p.hi_shift)&15
        h=(h|(h<<2))&0x33; h=(h|(h<<1))&0x55
        return (~(h*3)).reshape(-1,p.rows*T.shape[1])
LUT={}
def key(p): return (p.bits,p.width)
def lookup(table,P,x):
    idx=P.int().bitwise_left_shift_(8).bitwise_or_(x)
    return table.index_select(0,idx.flatten()).view(x.shape)
Z=zstandard.ZstdCompressor(level=1); D=zstandard.ZstdDecompressor()
def z(x):
    x=x.contiguous().numpy().reshape(-1); r=Z.compress(x); return r if len(r)<x.size else x.tobytes()
def encode_layer(L,T,F,n):
    out=[]
    for c in range(5):
        pred=iter(L.predict(F,c,n)) if F and L.mat else None
        for p in L.classes[c]:
            x=p.read(T); low3=p.bits==2 and p.width==3; m=L.mask(p,T) if low3 else None
            if low3: x=x^m
            if pred is not None and not(p.width==6 and p.bits==2):
                P=next(pred)
                if low3: P=P^m
                x=lookup(LUT[key(p)][0],P,x)
            out.append(z(x))
    return out
def decode_layer(L,blobs,F,n):
    T=torch.empty((L.codec.page_nbytes,n),dtype=torch.uint8); it=iter(blobs)
    T[-8:]=0
    for c in range(5):
        pred=iter(L.predict(F,c,n)) if F and L.mat else None
        for p in L.classes[c]:
            b=next(it); size=p.n_bytes*n
            raw=b if len(b)==size else D.decompress(b,max_output_size=size)
            x=torch.frombuffer(bytearray(raw),dtype=torch.uint8).view(-1,p.rows*n)
            low3=p.bits==2 and p.width==3; m=L.mask(p,T) if low3 else None
            if pred is not None and not(p.width==6 and p.bits==2):
                P=next(pred)
                if low3: P=P^m
                x=lookup(LUT[key(p)][1],P,x)
            if low3: x=x^m
            p.write(T,x)
    return T
def count(L,T,F,n,C):
    for c in range(5):
        pred=iter(L.predict(F,c,n))
        for p in L.classes[c]:
            if p.width==6 and p.bits==2: continue
            x=p.read(T);P=next(pred)
            if p.bits==2 and p.width==3: m=L.mask(p,T);x=x^m;P=P^m
            b=p.bits
            for i in range(p.per):
                f=(x>>(b*i))&(2**b-1); g=(P>>(b*i))&(2**b-1) if b<8 else P
                t=np.bincount((g.long()*2**b+f).flatten().numpy(),minlength=(2**b)**2 if b<8 else 65536)
                C[key(p)]=C.get(key(p),0)+t
def luts(C):
    for (b,w),t in C.items():
        t=t.reshape(-1,2**b).astype(float)
        if not(b==2 and w==3): t=t+(t[::-1,::-1] if b<8 else 0)
        P=(t+.5*(t.sum(0)+1)/t.sum())/(t.sum(1,keepdims=True)+.5); L=np.round(np.log2(P)*256).astype(int)
        per=8//b; by=np.arange(256); f=[(by>>(b*i))&(2**b-1) for i in range(per)]
        J=L if b==8 else sum(L[f[i][:,None],f[i][None]] for i in range(per))
        inv=np.argsort(-J,1,kind="stable"); r=np.argsort(inv,1,kind="stable")
        LUT[(b,w)]=(torch.from_numpy(r.astype(np.uint8).ravel()),torch.from_numpy(inv.astype(np.uint8).ravel()))
def measured(coders, pages, sources, rounds):
    """Sizes and speeds over the pages of every text, which must come back."""
    packed, times = sum(p.numel() for row in pages for p in row), [9e9, 9e9]
    for _ in range(rounds):
        begin = time.process_time()
        blobs = []
        for row in pages:
            below, out = [], []
            for coder, page in zip(coders, row):
                turned = page.t().contiguous()
                out.append(encode_layer(coder, turned, below, len(page)))
                below = [*below, coder.features(turned)][-sources:]
            blobs.append(out)
        middle = time.process_time()
        back = []
        for row, blob in zip(pages, blobs):
            below, out = [], []
            for coder, page, streams in zip(coders, row, blob):
                turned = decode_layer(coder, streams, below, len(page))
                below = [*below, coder.features(turned)][-sources:]
                out.append(turned.t().contiguous())
            back.append(out)
        end = time.process_time()
        times = [min(times[0], middle - begin), min(times[1], end - middle)]
    assert all(torch.equal(a, b) for row, again in zip(pages, back) for a, b in zip(row, again))
    size = sum(len(stream) + 9 for blob in blobs for streams in blob for stream in streams)
    return {"ratio": packed / size, "encode_mb_s": packed / times[0] / 1e6, "decode_mb_s": packed / times[1] / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--settings", default="8x")
    parser.add_argument("--sources", default="1,2")
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    loaded, profile = load_model(options.model, dtype="float32"), SpectralProfile.load(options.profile)
    files = [sorted(folder.glob("*.txt")) for folder in (options.calibration, options.texts)]
    per = -(-options.calibration_tokens // 2048 // len(files[0]))
    windows = [
        [i for p in files[0] for i in text_windows(loaded, p, per, 2048, 0)],
        [i for p in files[1] for i in text_windows(loaded, p, 1, options.tokens, 1)],
    ]
    result = {"model": Path(options.model).name, "profile_hash": profile.content_hash, **provenance(), "settings": {}}
    for name in options.settings.split(","):
        book = profile.codebook(name)
        rows = [[pages_of(loaded, {name: book}, ids)[name] for ids in side] for side in windows]
        for sources in map(int, options.sources.split(",")):
            spectral.link_fit.SOURCES = spectral.linked.SOURCES = sources
            links = fit_links(book, [torch.cat(layer) for layer in zip(*rows[0])])
            coders, counts = [LayerCoder(codec) for codec in book.layers], {}
            for i, coder in enumerate(coders):
                coder.link(links.layers[i], coders[max(0, i - sources) : i])
            for row in rows[0]:
                below = []
                for coder, page in zip(coders, row):
                    turned = page.t().contiguous()
                    if below:
                        count(coder, turned, below, len(page), counts)
                    below = [*below, coder.features(turned)][-sources:]
            luts(counts)
            found = measured(coders, rows[1], sources, 5)
            result["settings"].setdefault(name, {})[f"{sources} below"] = found
            print(name, sources, found, flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
