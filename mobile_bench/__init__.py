"""Everything known about a .tflite file once it exists: what it answers and how fast it is.

    from mobile_bench.evaluate import evaluate     accuracy by the file itself
    from mobile_bench.measure import measure       latency in a fresh process
    from mobile_bench.stats import summarize       median with its interval, p90, p99, frames per second
    from mobile_bench.store import read_study      a study folder
    from mobile_bench.interpreter import open_model   one face over the runtimes

Needs numpy and one TFLite runtime (ai-edge-litert or tflite-runtime); TensorFlow is never imported.
"""
