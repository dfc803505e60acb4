"""The transformer. Shape letters, here and in `parallel/`, `data/`:

B batch (packs), T tokens of a row, N tokens of a flattened batch, D d_model, H query heads,
G key/value heads, K head_dim, F d_ff, V vocabulary.
"""
