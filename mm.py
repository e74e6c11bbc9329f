import mmap,sys,hashlib,random
f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)
g=open(sys.argv[2],'rb'); n=mmap.mmap(g.fileno(),0,prot=mmap.PROT_READ)
random.seed(int(sys.argv[3])); S=len(m); assert S==len(n)
for i in range(200):
    o=random.randrange(S); k=random.choice([1,4096,100000,3000000])
    assert m[o:o+k]==n[o:o+k],(o,k)
print('mm ok')
