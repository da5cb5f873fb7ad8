"""Coarser runs of latents, one deviation a run, uniform tables, and squeezes with them: as it ran.

    python exp7.py PROFILE MODEL TEXT_FOLDER
"""
import numpy as np, torch, copy, sys, time
from pathlib import Path
from spectral.hf import load_model
from spectral.profile import SpectralProfile
from spectral import bits as B
from spectral.codec import *
from spectral.scoring import ExactPass, skipped
from spectral.oneshot import score_oneshot
torch.set_num_threads(1)
p=SpectralProfile.load(sys.argv[1])
import inspect
loaded=load_model(sys.argv[2])
files=sorted(Path(sys.argv[3]).glob('*'))
ids=[]
for f in files[:4]:
    ids.append(loaded.tokenizer(f.read_text()[:40000],add_special_tokens=False)['input_ids'][1000:1000+1536])
ex=[ExactPass.run(loaded,i) for i in ids]
# distortions on Laplace-ish/Gaussian mixture
rng=np.random.default_rng(0)
g=rng.standard_normal(400000)*np.exp(.25*rng.standard_normal(400000)); g/=g.std()
D=[]
for w in B.WIDTHS:
    if w==0: D.append(1.0); continue
    t=p.tables[w]; D.append(float(((g-t.levels[np.searchsorted(t.cuts,g)])**2).mean()))
D=np.array(D); print('distortion',dict(zip(B.WIDTHS,D.round(5))))
CNT=np.array([1,1,2,4,8])
def alloc(total_bits_per_layer_token, run):
    errs=[];sizes=[];where=[]
    for li,l in enumerate(p.layers):
        for ui,u in enumerate(l.units):
            R=u.variance.size//run*run
            e=(u.variance[:R]*u.deviation[:,:R]**2).reshape(5,-1,run).sum(2)*CNT[:,None]/16
            errs.append((D[:,None,None]*e).reshape(len(D),-1)); sizes.append(np.repeat(run*CNT/16,R//run))
            where+=[(li,ui,c,r) for c in range(5) for r in range(R//run)]
    picked=B.allocate(np.concatenate(errs,1),np.concatenate(sizes),total_bits_per_layer_token)
    out=[[np.zeros(u.deviation.shape,np.uint8) for u in l.units] for l in p.layers]
    for (li,ui,c,r),w in zip(where,picked): out[li][ui][c,r*run:(r+1)*run]=w
    return out
def smooth(unit,run):
    d=unit.deviation.copy(); R=d.shape[1]//run*run
    m=np.sqrt((d[:,:R]**2*1).reshape(5,-1,run).mean(2))
    d[:,:R]=np.repeat(m,run,1)
    u=copy.copy(unit)
    return u.__class__(u.heads,u.mean,u.decode,u.encode,u.variance,d)
def kl(setting,widths,ratio_run=None):
    q=copy.copy(p)
    q.bits=dict(p.bits); q.bits[setting]=widths
    if ratio_run:
        q.layers=[copy.copy(l) for l in p.layers]
        for l in q.layers: l.units=[smooth(u,ratio_run) for u in l.units]
    cb=q.codebook(setting)
    nb=cb.page_nbytes()
    out=[]
    for e in ex:
        t=score_oneshot(e,cb); k=t['kl']; out.append(float(k[skipped(len(e.ids)):].mean()) if k.numel()==len(e.ids) else float(k.mean()))
    return np.mean(out),nb
for s in ['4x','8x','16x']:
    w0=p.bits[s]; row=p.row(s)
    base=kl(s,w0); print(s,'shipped',base,flush=True)
    tot=row.page_nbytes*8/16
    for run in (16,32,64):
        print(s,'run',run,kl(s,alloc(tot,run)),flush=True)
    print(s,'shipped widths, ratio per 64',kl(s,w0,64),flush=True)
    print(s,'shipped widths, ratio per 16',kl(s,w0,16),flush=True)
    print(s,'run 64 + ratio 64',kl(s,alloc(tot,64),64),flush=True)

# real coefficients
e=ExactPass.run(loaded, loaded.tokenizer(files[5%len(files)].read_text()[:20000],add_special_tokens=False)['input_ids'][:2052], keep_cache=True)
cb=p.codebook('4x'); pool=[]
for li,c in enumerate(cb.layers):
    k=e.keys[li].transpose(0,1)[:,4:2052]; v=e.values[li].transpose(0,1)[:,4:2052]  # [H,N,d]
    n=2048//16
    K=k.unflatten(1,(n,16)).transpose(0,1); V=v.unflatten(1,(n,16)).transpose(0,1)
    K=c.frame.keys(K.float(),torch.arange(n))
    u=c.units[0]
    x=torch.cat([s.transpose(1,2).reshape(n,16,-1) for s in (K,V.float())],-1)
    y=torch.matmul(u.dct,(x-u.mean)@u.project)/u.deviation
    pool.append(y[...,:256].flatten()[::7].numpy())
g=np.concatenate(pool); g=g[np.isfinite(g)]; print('pool',g.size,g.std(),'kurt',(g**4).mean()/g.var()**2)
half=np.sort(np.abs(g))
ms=lambda t:float(((g-t.levels[np.searchsorted(t.cuts,g)])**2).mean())/float((g**2).mean())
print('shipped D',{w:round(ms(t),5) for w,t in p.tables.items()})
from spectral.bits import Table,uniform_levels,_Cells,gaussian_step
uni={}
cells=_Cells(half)
for w in (1,2,3,4):
    best=None
    for st in gaussian_step(w)[0]*np.geomspace(.6,3,80):
        t=Table.nearest(uniform_levels(w,st)); d=ms(t)
        if best is None or d<best[0]: best=(d,t)
    uni[w]=best[1]
    print(w,'uniform D',round(best[0],5))
# nested: cuts on grid of 6-bit step; uniform levels by least squares
step6=p.tables[6].levels[-1]-p.tables[6].levels[-2]
def fitlev(cuts):  # positive cuts -> step, mse
    b=np.concatenate([[0],np.searchsorted(half,cuts),[half.size]])
    m=np.arange(len(cuts)+1)+.5
    s1=np.diff(cells.total[b]); cnt=np.diff(b); s2=cells.square[-1]
    st=(s1*m).sum()/(cnt*m*m).sum()
    return st,(s2-2*st*(s1*m).sum()+st*st*(cnt*m*m).sum())/half.size/float((g**2).mean())
best=None
import itertools
def cost(grid):
    c=grid*step6
    return 2*fitlev(c)[1]/ms(uni[4])+fitlev(c[1::2])[1]/ms(uni[3])+fitlev(c[3:4])[1]/ms(uni[2])
grid=np.clip(np.round(uni[4].cuts[8:]/step6),1,31).astype(int); 
grid=np.maximum.accumulate(grid-np.arange(7))+np.arange(7)
least=cost(grid); imp=True
while imp:
    imp=False
    for at in range(7):
        for mv in (-1,1):
            gg=grid.copy(); gg[at]+=mv
            if gg[0]<1 or gg[-1]>31 or (np.diff(gg)<=0).any(): continue
            c=cost(gg)
            if c<least-1e-12: grid,least,imp=gg,c,True
nest={1:uni[1]}
for w,c in ((2,grid[3:4]),(3,grid[1::2]),(4,grid)):
    st,d=fitlev(c*step6); print(w,'nested uniform D',round(d,5)); nest[w]=Table.mirrored(uniform_levels(w,st)[2**(w-1):],c*step6)
for w in (6,8): nest[w]=p.tables[w]; uni[w]=p.tables[w]
def kl(setting,tables):
    q=copy.copy(p); q.tables=tables
    cb=q.codebook(setting); out=[]
    for e in ex:
        t=score_oneshot(e,cb); k=t['kl']; out.append(float(k[skipped(len(e.ids)):].mean()) if k.numel()==len(e.ids) else float(k.mean()))
    return float(np.mean(out))
for s in ['4x','8x','16x']:
    print(s,'shipped',kl(s,p.tables),'uniform',kl(s,uni),'nested uniform',kl(s,nest),flush=True)

def score(tables,s,finer=None):
    q=copy.copy(p); q.tables=tables
    cb=q.codebook(s); f=q.codebook(finer) if finer else None; out=[]
    for e in ex:
        k=score_oneshot(e,cb,finer=f)['kl']; out.append(float(k[skipped(len(e.ids)):].mean()) if k.numel()==len(e.ids) else float(k.mean()))
    return float(np.mean(out))
# semi-nested: 2-bit step = 3 * 4-bit step ; 3-bit cuts free
semi=dict(uni); s4=uni[4].levels[-1]-uni[4].levels[-2]; s2=uni[2].levels[-1]-uni[2].levels[-2]; s3=uni[3].levels[-1]-uni[3].levels[-2]
print('steps',s2,s3,s4, s2/s4, s2/s3, uni[6].levels[-1]-uni[6].levels[-2])
for a,b in (('4x','8x'),('8x','16x'),('6x','10x'),('10x','12x')):
    print(a,b,'direct',score(uni,b),'squeezed',score(uni,b,a),flush=True)
