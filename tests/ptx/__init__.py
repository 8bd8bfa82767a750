"""A PTX interpreter: runs the kernels that nvcc and Triton emit on a CPU, and watches what they do.

parser.py reads PTX; instructions.py turns each basic block into a function over numpy arrays, a
register being an array over the threads of a block (arithmetic.py says what a number becomes);
machine.py runs blocks one after the other and moves threads between basic blocks and barriers;
memory.py is global and shared memory. detectors.py finds races, counters.py counts sectors and bank
conflicts, and both cost nothing where a launch does not ask for them.

cuda_host.py compiles csrc/ with nvcc and stands in for the CUDA runtime (cudart.cpp) under the real
launch code, so that every launch comes as on a card; triton_host.py stands in for Triton's driver.
cases.py takes steps through both and compares them with the float64 restatement. tests/test_ptx.py
runs a selection, grid.py everything (`make test-ptx`), mutants.py what must be caught.

Not modelled: ptxas, NaN payloads, caches, and lanes of one warp that run ahead of each other.
"""
