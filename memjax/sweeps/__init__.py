"""The parts of `memjax.sweep`: where trials run (`runner`, `cluster`, `process`), which ones
(`search`), what is seen of them (`table`), and how they run elsewhere (`export`)."""
