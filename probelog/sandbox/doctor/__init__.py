"""Which guards hold on this machine, by trying them."""
