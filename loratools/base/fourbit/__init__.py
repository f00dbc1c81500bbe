"""NF4 and FP4 as bitsandbytes defines them: blocks of four-bit codes with one scale each.

`encode` makes the very bytes of bitsandbytes' CPU code, `decode` reads them back, `scales` handles
the blocks' largest magnitudes and `tables` holds the constants. Everything streams: a tensor
passes through in pieces of fixed size, and only its scales stay, 1/16 byte an element.
Source: QLoRA, arXiv 2305.14314; bitsandbytes 0.50, `backends/default/ops.py` and
`csrc/cpu_ops.cpp`.
"""
