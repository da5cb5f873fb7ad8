import sys, time, json, math, os
import numpy as np, torch, triton
from spectral.layout import page_layout, PLANES, PLANE_ORDER
from spectral.bits import frequency_classes, dct_matrix
from spectral.kernels.tables import layer_tables
from spectral.kernels.score import score_kernel
from spectral.kernels.mix import mix_kernel, factor_kernel
from spectral.kernels.combine import combine_kernel
W={'8x':["8 6 6 4 4 4 4 4 4 4 4 3 3 3 3 3 3 3 2 2 2 2 2 2 1 1 1 0 0 0 0 0","6 4 4 4 4 4 4 3 3 3 3 3 3 3 2 2 2 2 2 2 1 1 1 1 1 0 0 0 0 0 0 0","6 4 4 4 4 3 3 3 3 3 3 3 3 2 2 2 2 2 2 2 1 1 1 1 0 0 0 0 0 0 0 0","6 4 4 4 3 3 3 3 3 3 3 2 2 2 2 2 2 2 1 1 1 1 1 0 0 0 0 0 0 0 0 0","6 4 4 3 3 3 3 3 3 2 2 2 2 2 2 2 2 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0"],
'16x':["6 4 4 4 3 3 3 3 3 2 2 2 2 2 2 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0","4 4 3 3 3 3 3 2 2 2 2 2 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0","4 3 3 3 3 2 2 2 2 2 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0","4 3 3 2 2 2 2 2 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0","3 3 2 2 2 2 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"],
'tiny':["8 6 4 3 2 1 0 0","6 4 3 2 1 1 0 0","4 3 3 2 1 0 0 0","3 2 2 1 1 0 0 0","3 2 1 1 0 0 0 0"]}
SO={}; MO={}
MW=int(os.environ.get('MW','4'))
def widths(name, rep): return np.repeat(np.array([[int(a) for a in r.split()] for r in W[name]],np.uint8),rep*16,1)
STEPS={1:1.6,2:1.0,3:.6,4:.34,6:.11,8:.03}
class Layer:
    def __init__(s, name, rep, units, kv, G, d, device, seed=0):
        rng=np.random.default_rng(seed); w=widths(name,rep); s.R=w.shape[1]; s.lay=page_layout(w,16)
        s.dev=[rng.uniform(.3,1.2,size=w.shape) for _ in range(units)]
        s.t=layer_tables([(s.lay,x) for x in s.dev],STEPS); s.T=s.t.to(device); s.units=units; s.kv=kv; s.G=G; s.d=d; s.H=kv*units*G
        s.nb=s.lay.nbytes*units; s.device=device
        s.unit=torch.tensor([[u*kv*G,kv*G,u*s.lay.nbytes,s.lay.nbytes] for u in range(units)],dtype=torch.int32,device=device)
    def codes(s, pages):  # uint8 [n, nb] -> float64 std*dev coefficients [units][n,16,R]
        out=[]
        for u in range(s.units):
            p=pages[:,u*s.lay.nbytes:(u+1)*s.lay.nbytes].cpu().numpy(); c=np.zeros((len(p),16*s.R),np.int64)
            for pl in s.lay.planes:
                b=p[:,pl.byte]; f=((b[:,:,None]>>np.arange(0,8,pl.bits))&(2**pl.bits-1)).reshape(len(p),-1)
                ok=pl.place>=0; np.add.at(c,(slice(None),pl.place[ok]),f[:,ok].astype(np.int64)<<pl.shift[ok].astype(np.int64))
            rw=s.lay.row_widths.ravel().astype(np.float64); st=np.array([STEPS.get(i,0) for i in range(9)])[s.lay.row_widths.ravel()]
            dv=np.repeat(s.dev[u],[1,1,2,4,8],0).ravel()
            out.append(torch.from_numpy(((c-(2**rw-1)/2)*st*dv).reshape(len(p),16,s.R)))
        return out
_memo={}
def lanes(L,q,B,blocks):
    if id(q) in _memo: return _memo[id(q)]
    _memo.clear(); groups=-(-L.kv*L.G//16)
    x=q.view(L.units,L.kv,B,blocks,L.G,L.R).permute(2,0,3,1,4,5).reshape(B,L.units,blocks,L.kv*L.G,L.R)
    x=torch.nn.functional.pad(x,(0,0,0,groups*16-L.kv*L.G)).view(B,L.units,blocks,groups,2,8,L.R//16,4,4)  # hi,g,run,t,j
    out=x.permute(0,1,3,2,6,5,7,4,8).contiguous()
    _memo[id(q)]=out
    return out
def run(L, pool, table, count, q, mean, blocks, splits, split_blocks, bufs, wtop, wsum, fast, only=None):
    B=count.numel(); dev=L.device; groups=-(-L.kv*L.G//16)
    weight,maxima,out,sums,top,latent,share,fac,const=bufs
    pm=blocks*32
    if only in (None,'score'):
        score_kernel[(L.units*groups,blocks,B)](lanes(L,q,B,blocks),const,pool,table,count,L.unit,L.T['strip'],L.T['run'],L.T['factor'],weight,maxima,table.stride(0),L.nb,L.R,blocks,pm,L.units,L.H,GROUPS=groups,CLASSES=5,P=16,SOFTCAP=0.0,WARPS=4,FAST=fast,num_warps=4,num_stages=1,**SO)
    if only in (None,'mix'):
        factor_kernel[(L.units*groups,splits,B)](count,maxima,fac,top,blocks,L.units,splits,split_blocks,GROUPS=groups,PB=32,SB=triton.next_power_of_2(split_blocks),num_warps=4)
        cls=L.t.item[:,1]
        for c in (4,3,2,1,0):
            ix=np.flatnonzero(cls==c)
            if ix.size: mix_kernel[(ix.size*groups,splits,B)](pool,table,count,L.T['item'],weight,fac,out,sums,int(ix[0]),table.stride(0),L.nb,blocks,pm,L.units,splits,L.t.outputs,split_blocks,GROUPS=groups,CLASS=c,CLASSES=5,P=16,PB=32,WARPS=MW,FAST=fast,num_warps=MW,num_stages=1,**MO)
    if only in (None,'combine'):
        combine_kernel[(L.units*groups,triton.cdiv(L.R,64),B)](out,sums,top,count,L.unit,L.T['source'],L.T['source_factor'],L.T['offset'],wtop,wsum,latent,share,L.units,splits,L.t.outputs,split_blocks,L.R,L.H,B,GROUPS=groups,GROUP=L.G,CLASSES=5,P=16,PB=32,RT=64,num_warps=4)
def setup(L, B, pages, splits, seed=0):
    g=torch.Generator().manual_seed(seed); dev=L.device
    blocks=-(-pages//32); split_blocks=-(-blocks//splits); groups=-(-L.kv*L.G//16)
    q=(torch.randn(L.kv*L.units,B*blocks*L.G,L.R,generator=g)*.08).half().to(dev)
    const=torch.zeros(B,blocks,L.H,8,device=dev)
    z=lambda *s,dt=torch.float32: torch.zeros(*s,dtype=dt,device=dev)
    bufs=(z(B,L.units,groups,blocks*32,16,16,dt=torch.float16),z(B,L.units,groups,blocks,16),z(B,splits,groups,16,L.t.outputs),z(B,splits,L.units,groups,5,16),z(B,splits,L.units,groups,16),z(L.kv*L.units,B,L.G,L.R,dt=torch.float16),z(B,L.H,2),z(B,L.units,groups,blocks,16,dt=torch.int32),const)
    return q,blocks,split_blocks,bufs
def check(L,B,pages,splits,fast,seed=0,ragged=True):
    g=torch.Generator().manual_seed(seed); n=B*pages
    flat=torch.randint(0,256,(n*L.nb+4096,),generator=g,dtype=torch.uint8).to(L.device); pool=flat[:n*L.nb].view(n,L.nb)
    table=torch.randperm(n,generator=g).view(B,pages).int().to(L.device)
    count=torch.tensor([pages-(i*7)%pages if ragged else pages for i in range(B)],dtype=torch.int32,device=L.device)
    q,blocks,sb,bufs=setup(L,B,pages,splits)
    const=bufs[-1]
    y=L.codes(pool)
    # offsets: const[c] = sum_r off[c,r] q[r]
    off=torch.from_numpy(L.t.offset)  # [units,C,R]
    for u in range(L.units):
        for k in range(L.kv):
            qq=q[u*L.kv+k].double().cpu().view(B,blocks,L.G,L.R)
            const[:,:,u*L.kv*L.G+k*L.G:u*L.kv*L.G+(k+1)*L.G,:5]=torch.einsum('bngr,cr->bngc',qq,off[u].double()).float().to(L.device)
    const[...,7]=torch.randn(const.shape[:-1],generator=g).to(L.device)
    wtop=torch.randn(B,L.H,generator=g).to(L.device); wsum=(torch.rand(B,L.H,generator=g)+.5).to(L.device)
    run(L,pool,table,count,q,None,blocks,splits,sb,bufs,wtop,wsum,fast)
    M=torch.from_numpy(dct_matrix(16))
    errs=[]
    for b in range(B):
        c=int(count[b]); ids=table[b,:c].long().cpu()
        for h in range(L.H):
            u=h//(L.kv*L.G); k=h//L.G; gq=h%L.G
            yy=y[u][ids]  # c,16,R
            qq=q[k].double().cpu().view(B,blocks,L.G,L.R)[b,:,gq]  # blocks,R
            qb=qq[torch.arange(c)//32]
            s=torch.einsum('pfr,pr->pf',yy,qb); s=s@M + const[b,:,h,7].double().cpu()[torch.arange(c)//32][:,None]
            wt=float(wtop[b,h]); ws=float(wsum[b,h]); m=max(float(s.max()),wt)
            e=torch.exp2(s-m); den=e.sum()+ws*2**(wt-m)
            o=torch.einsum('pf,pfr->r',e@M.T,yy)/den
            got=bufs[5].view(L.kv*L.units,B,L.G,L.R)[k,b,gq].double().cpu()
            errs.append(float((got-o).norm()/o.norm()))
            sh=float(e.sum()/den); assert abs(float(bufs[6][b,h,0])-sh)<3e-3, (float(bufs[6][b,h,0]),sh)
    return max(errs), float(np.mean(errs))
if __name__=='__main__':
    dev='cuda' if torch.cuda.is_available() else 'cpu'
    fast=dev=='cuda'
    t=time.time()
    L=Layer('tiny',1,1,2,2,32,dev)
    print('tiny', check(L,1,5,1,fast), round(time.time()-t,1),flush=True)
    if dev=='cpu': sys.exit()
    L=Layer('8x',2,2,4,4,128,dev); print('8x', check(L,2,100,2,fast), round(time.time()-t,1),flush=True)
    print(torch.cuda.get_device_name())
    import torch.nn.functional as F
    def bench(fn): return triton.testing.do_bench(fn,warmup=10,rep=60,return_mode='median')*1e3
    a=torch.empty(1<<30,dtype=torch.uint8,device=dev); b=torch.empty_like(a); tc=bench(lambda: b.copy_(a)); copy=2*a.numel()/tc/1e6; print('copy TB/s',round(copy,2)); del a,b
    SO={'maxnreg':128}; MO={'maxnreg':128}
    for B,S,splits in ((32,32768,1),(8,32768,2)):
        for name in ('8x','16x'):
            L=Layer(name,2,2,4,4,128,dev); pages=S//16
            n=B*pages; pool=torch.randint(0,256,(n*L.nb+4096,),dtype=torch.uint8,device=dev)[:n*L.nb].view(n,L.nb)
            table=torch.arange(n,device=dev).view(B,pages).int(); count=torch.full((B,),pages,dtype=torch.int32,device=dev)
            q,blocks,sb,bufs=setup(L,B,pages,splits); wt=torch.zeros(B,L.H,device=dev); ws=torch.ones(B,L.H,device=dev)
            r={o:round(bench(lambda: run(L,pool,table,count,q,None,blocks,splits,sb,bufs,wt,ws,True,o)),1) for o in ('score','mix','combine')}
            from spectral.kernels.combine import project_kernel
            fr=torch.randn(8,B*blocks*4,128,device=dev,dtype=torch.float16); bs=torch.randn(8,128,L.R,device=dev,dtype=torch.float16)
            kvu=torch.tensor([0]*4+[1]*4,dtype=torch.int32,device=dev); qo=torch.empty(B*2*blocks*16*L.R,dtype=torch.float16,device=dev)
            for NN,RR in ((64,128),(128,128)):
                r[f'proj{NN}']=round(bench(lambda: project_kernel[(8,triton.cdiv(B*blocks*4,NN),triton.cdiv(L.R,RR))](fr,bs,L.unit,kvu,qo,blocks,B,2,L.R,GROUP=4,GROUPS=1,D=128,DIM=128,N=NN,R=RR,num_warps=4)),1)
            cls=L.t.item[:,1]; weight,maxima,out,sums,top,latent,share,fac,const=bufs
            for c in (4,3,2,1,0):
                ix=np.flatnonzero(cls==c)
                if ix.size: r[f'mix{c}']=round(bench(lambda: mix_kernel[(ix.size,splits,B)](pool,table,count,L.T['item'],weight,fac,out,sums,int(ix[0]),table.stride(0),L.nb,blocks,blocks*32,2,splits,L.t.outputs,sb,GROUPS=1,CLASS=c,CLASSES=5,P=16,PB=32,WARPS=4,FAST=True,num_warps=4,num_stages=1,maxnreg=128)),1); r[f'items{c}']=int(ix.size)
            print(json.dumps(dict(B=B,S=S,name=name,**r)),flush=True)
            del q,bufs,pool
