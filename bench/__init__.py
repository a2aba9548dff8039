"""Batch normalization of bn_ext measured side by side with torch's own kernels.

    python -m bench            measure on the CPU, write bench/results/cpu.json; --sections patterns memory training
    python -m bench.report     table and picture from that file
    python -m bench.gpu core   the same on a GPU, part by part, into build/gpu

Blocks are batch norm alone, with ReLU and with add and ReLU, a call each of bn_ext's.
One timing is a ratio: every peer of a case runs in one process, in turn, after its results were
found equal to the float64 reference.
"""
