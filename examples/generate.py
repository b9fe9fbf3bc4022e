"""Ten lines: an artefact writes greedily, in TVM's runtime alone. usage: generate.py OUT COUNT ID [ID ...]"""

import sys

import numpy as np

from tvm_sparse.engine import Engine

engine = Engine(sys.argv[1])
logits = engine.prefill([int(token) for token in sys.argv[3:]])
for _ in range(int(sys.argv[2])):
    token = int(np.argmax(logits))
    print(token, end=" ", flush=True)
    logits = engine.decode(token)
