"""The only place that knows TFMOT and tf_keras.

neutral.py   a model as plain data: what crosses between the two Keras versions
bridge.py    Keras 3 -> neutral, and trained weights back        (this process)
client.py    start the worker, hand it data, read its answer     (this process)
worker.py    the child process: prune, quantize, convert, …      (tf_keras and TFMOT)
rebuild.py   neutral -> tf_keras                                 (worker only)
pruning.py   TFMOT's pruning wrappers                            (worker only)
rounding.py  where simulated int8 rounds, on the neutral graph   (worker; plain data)
fakequant.py TFMOT's fake quantization                           (worker only)
savedmodel.py  Keras 2's SavedModel folders, through the worker  (this process)

Importing TFMOT changes the process it is imported in, so nothing here imports it at the top of a
module that the parent uses.
"""
