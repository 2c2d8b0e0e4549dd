"""The Linen shell: layers, mixers, blocks, the stack and the language model. No memory mathematics."""
