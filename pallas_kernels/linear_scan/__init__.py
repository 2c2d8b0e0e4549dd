"""h_t = e^(g_t) h_{t-1} + x_t, elementwise, with the RG-LRU's weight of x."""
