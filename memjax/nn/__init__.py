"""The Linen shell: layers, mixers, blocks, stack, language model. No memory mathematics."""
