import ctypes, torch
from sparsepass.graph.packed.layout import pack, unpack
from sparsepass.graph.packed.arrange import arrange
lib=ctypes.CDLL('libsparsepass.so'); P=lambda t: ctypes.c_void_p(0 if t is None else t.data_ptr()); L=ctypes.c_long
torch.manual_seed(0)
def prune(w):
    g=w.view(w.shape[0],-1,4); m=torch.zeros_like(g,dtype=torch.bool).scatter_(-1,g.abs().topk(2,-1).indices,True); return (g*m).view_as(w)
for O,I in ((64,576),(33,64),(16,72),(8,2048)):
    w=prune(torch.randn(O,I).bfloat16()); w[3]=0; w[1,5:60]=0
    p=pack(w); assert torch.equal(unpack(p),w+0.0),'bf16'
    for v,g in (('bf16',0),('int8',0),('int8',128),('int4',128),('int4',0)):
        p=pack(w.float(),values=v,group_size=g); d=unpack(p).double(); a=arrange(p)
        for T in (1,4):
            K=a.padded_columns; y=torch.empty(T,O)
            if v=='bf16':
                x=torch.randn(T,I).bfloat16(); xp=torch.nn.functional.pad(x,(0,K-I)).contiguous(); xs=None; ref=x.double()@d.T
            else:
                xi=torch.randint(-127,128,(T,I)); xp=torch.nn.functional.pad((xi+128).to(torch.uint8),(0,K-I),value=128).contiguous(); xs=torch.rand(T); ref=xs.double()[:,None]*(xi.double()@d.T)
            for path in (0,1):
                assert lib.sparsepass_product(path,a.step.kind,P(a.data),P(a.scales),P(a.sums),P(xp),P(xs),P(y),L(O),L(K),L(a.group_steps),L(T),2)==0
                e=float((y-ref).norm()/ref.norm()); assert e<2e-6,(O,I,v,g,T,path,e)
print('ok', p.num_bytes)
