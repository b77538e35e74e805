import ctypes, torch, time, sys
lib=ctypes.CDLL('libsparsepass.so')
import glob,os
g=glob.glob(os.path.join(os.path.dirname(torch.__file__),'lib','libgomp*')); print(g)
if '--gomp' in sys.argv:
    gl=ctypes.CDLL(g[0]); lib.sparsepass_use_openmp(ctypes.cast(gl.GOMP_parallel,ctypes.c_void_p))
def prune(w):
    O,I=w.shape; gr=w.view(O,I//4,4); idx=gr.abs().topk(2,-1).indices.sort(-1).values
    return gr.gather(-1,idx).reshape(O,I//2), idx.reshape(O,I//2).to(torch.uint8)
def arrange(vals, codes, width, steps, vb):
    # vals [O,K/2] (any dtype as uint8 bytes per step), codes [O,K/2] uint8
    O,H=vals.shape; S=-(-2*H//width); pad=S*width//2-H
    vals=torch.nn.functional.pad(vals,(0,pad)); codes=torch.nn.functional.pad(codes,(0,pad))
    lanes=width//2
    v=vals.view(O,S,lanes); c=codes.view(O,S,lanes)
    out=[]
    for s in range(0,S,steps):
        n=min(steps,S-s)
        ct=torch.int32
        w=torch.zeros(O,lanes,dtype=ct)
        for k in range(n): w|=c[:,s+k].to(ct)<<(2*k)
        if vb=='bf16':
            out.append(v[:,s:s+n].reshape(O,-1).view(torch.uint8)); out.append(w.to(torch.uint16).view(torch.uint8) if False else (w & 0xffff).to(torch.int32).numpy().astype('uint16').view('uint8'))
            out[-1]=torch.from_numpy(out[-1].copy()).reshape(O,-1)
        elif vb=='int8':
            out.append(v[:,s:s+n].reshape(O,-1).view(torch.uint8)); out.append(w.to(torch.uint8))
        else:
            q=v[:,s:s+n]
            for j in range(0,n,2):
                lo=q[:,j]; hi=q[:,j+1] if j+1<n else torch.zeros_like(lo)
                out.append((lo|(hi<<4)).to(torch.uint8))
            out.append(w.to(torch.uint8))
    return torch.cat(out,1).contiguous(), S*width
P=lambda t: ctypes.c_void_p(0 if t is None else t.data_ptr())
def product(path,kind,w,sc,sums,x,xs,O,K,gs,T,th=2):
    y=torch.empty(T,O)
    r=lib.sparsepass_product(path,kind,P(w),P(sc),P(sums),P(x),P(xs),P(y),ctypes.c_long(O),ctypes.c_long(K),ctypes.c_long(gs),ctypes.c_long(T),th)
    assert r==0,(path,kind); return y
torch.manual_seed(0)
for O,I in ((64,576),(33,64),(128,2048),(16,68)):
    w=torch.randn(O,I).to(torch.bfloat16); v,c=prune(w); pk,K=arrange(v,c,64,8,'bf16')
    dense=torch.zeros(O,I,dtype=torch.float64).view(O,I//4,4).scatter_(-1,c.view(O,I//4,2).long(),v.view(O,I//4,2).double()).view(O,I)
    for T in (1,2,3,5,8,13):
        x=torch.randn(T,I).to(torch.bfloat16); xp=torch.nn.functional.pad(x,(0,K-I)).contiguous()
        ref=x.double()@dense.T
        print(O,I,T,[float((product(p,0,pk,None,None,xp,None,O,K,0,T)-ref).norm()/ref.norm()) for p in (0,1)])
    for kind,name in ((1,'int8'),(2,'int4')):
        q=torch.randint(-8,8,v.shape).to(torch.int8)
        pk,K=arrange((q+8).to(torch.uint8) if kind==2 else q,c,128,4,name)
        if kind==2 and K!=I: # padding must be 8 (zero) 
            H=v.shape[1]; qq=torch.nn.functional.pad((q+8).to(torch.uint8),(0,K//2-H),value=8); cc=torch.nn.functional.pad(c,(0,K//2-H)); pk,K=arrange(qq,cc,128,4,name)
        S=K//128; sc=torch.rand(O,S)+.5
        qd=torch.zeros(O,I,dtype=torch.float64).view(O,I//4,4).scatter_(-1,c.view(O,I//4,2).long(),q.view(O,I//4,2).double()).view(O,I)
        qd=torch.nn.functional.pad(qd,(0,K-I)).view(O,S,128)*sc.double()[:,:,None]; qd=qd.view(O,K); sums=qd.sum(1).float()
        for T in (1,3,8):
            xi=torch.randint(-127,128,(T,I)); xb=torch.nn.functional.pad((xi+128).to(torch.uint8),(0,K-I),value=128).contiguous(); xs=torch.rand(T)
            ref=xs.double()[:,None]*(torch.nn.functional.pad(xi.double(),(0,K-I))@qd.T)
            print(name,O,I,T,[float((product(p,kind,pk,sc,sums,xb,xs,O,K,1,T)-ref).norm()/ref.norm()) for p in (0,1)])
if '--time' in sys.argv:
    torch.set_num_threads(2)
    for O,I in ((2048,2048),(8192,2048),(4096,4096),(14336,4096),(4096,14336)):
        n=max(2,int(4e8/(O*I*2))); w=torch.randn(O,I).to(torch.bfloat16); v,c=prune(w); pk,K=arrange(v,c,64,8,'bf16')
        W=[pk.clone() for _ in range(n)]; D=[w.clone() for _ in range(n)]; x=torch.randn(1,I).to(torch.bfloat16)
        A=[];B=[]
        for i in range(40):
            t=time.perf_counter(); product(1,0,W[i%n],None,None,x,None,O,K,0,1); A.append(time.perf_counter()-t)
            t=time.perf_counter(); torch.nn.functional.linear(x,D[i%n]); B.append(time.perf_counter()-t)
        a=sorted(A)[20]; b=sorted(B)[20]; print(O,I,'packed %.2f ms %.1f GB/s torch %.2f ms %.1f GB/s ratio %.2f'%(a*1e3,O*I*9/8/a/1e9,b*1e3,O*I*2/b/1e9,b/a))
