"""How a model and its training treat batch norms: what is seen of them, and the rules that speak about it."""
