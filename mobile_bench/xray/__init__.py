"""Where each operation of a .tflite will run, why not on the delegate, and what would change that.

    report = xray("model.tflite", "edgetpu")
    for op in report.ops:
        print(op.index, op.op, op.runs_on, op.reason, op.fix)

Nothing is run unless it is asked for: the file is read (mobile_bench.flatbuffer) and held against rules, each
with its source. `cpu` is the exception: what XNNPACK takes is what the runtime reports of this very file.
"""

from mobile_bench.xray.report import BACKENDS, DELEGATES, OpVerdict, XrayReport, xray

__all__ = ["BACKENDS", "DELEGATES", "OpVerdict", "XrayReport", "xray"]
