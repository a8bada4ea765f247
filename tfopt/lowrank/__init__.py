"""Low-rank factorization: one kernel as a chain of thinner ones.

kernels: the decompositions, on NumPy arrays. rank: how many singular values to keep. layers: what a Keras layer can
become. moments: what a layer answers on images, for factors that fit the data. search: which rank each layer gets.
race: whether the chain is faster than the layer, measured.
"""
