import sys,json,hashlib
from pathlib import Path
from safetensors.torch import load_file, save
d=Path(sys.argv[1]); t={}
for p in sorted(d.glob('*.safetensors')): t|=load_file(p)
print(hashlib.sha256(save(t,metadata={'format':'pt'})).hexdigest())
