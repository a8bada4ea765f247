"""The formulas of distillation, on TensorFlow tensors of one batch."""

from __future__ import annotations

import tensorflow as tf


def logits_of(outputs, head: str):
    """Logits from what a classifier answers, up to a constant that softmax drops: (batch, classes).

    Both versions of Keras leave them beside the probabilities of a softmax in the same graph. Where they are not, as
    behind simulated int8, they are the logarithm of probabilities, of which none counts as less than 1e-7.
    """
    if head == "logits":
        return outputs
    own = getattr(outputs, "_keras_logits", None)
    return own if own is not None else tf.math.log(tf.clip_by_value(outputs, 1e-7, 1.0))


def softened(logits, temperature: float):
    """Probabilities at a temperature: (batch, classes)."""
    return tf.nn.softmax(logits / temperature)


def divergence(soft, logits, temperature: float):
    """T² · KL(soft || student at T), mean over the batch (Hinton et al. 2015, arXiv:1503.02531, section 2.1).

    soft: the teachers' probabilities at that temperature. logits: the student's.
    """
    guess = tf.nn.log_softmax(logits / temperature)
    each = tf.reduce_sum(soft * (tf.math.log(soft + 1e-12) - guess), axis=-1)
    return temperature**2 * tf.reduce_mean(each)


def hint(teacher, regressed):
    """Half the mean squared difference of features (Romero et al. 2015, FitNets, arXiv:1412.6550, equation 3).

    Both of (batch, height, width, channels) or (batch, channels); `regressed` has the teacher's channels already.
    """
    return 0.5 * tf.reduce_mean(tf.math.squared_difference(teacher, regressed))


def attention(teacher, student):
    """Mean squared difference of normalized attention maps (Zagoruyko and Komodakis 2017, arXiv:1612.03928).

    A map is the sum over channels of squared features, as a vector of length 1. Features of (batch, height, width, any
    channels), of the same height and width.
    """
    return tf.reduce_mean(tf.math.squared_difference(_attention_map(teacher), _attention_map(student)))


def relational(teacher, student):
    """Distances plus twice the angles between the examples of a batch (Park et al. 2019, arXiv:1904.05068, eq. 4-8).

    Features of (batch, …), each flattened; the two need not have the same length. Weights 1 and 2 as in the paper.
    """
    teacher, student = _flat(teacher), _flat(student)
    distances = _huber(_distances(teacher), _distances(student))
    return distances + 2.0 * _huber(_angles(teacher), _angles(student))


def _attention_map(features):
    squares = tf.reduce_sum(tf.square(features), axis=-1)
    return tf.math.l2_normalize(_flat(squares), axis=-1, epsilon=1e-12)


def _flat(values):
    return tf.reshape(values, [tf.shape(values)[0], -1])


def _distances(values):
    """Pairwise distances as shares of their mean, (batch, batch)."""
    squares = tf.reduce_sum(tf.square(values), axis=-1)
    squared = squares[:, None] + squares[None] - 2 * tf.matmul(values, values, transpose_b=True)
    # Below the square root nothing may be 0: its slope is infinite there.
    lengths = tf.sqrt(tf.maximum(squared, 1e-12))
    apart = 1.0 - tf.eye(tf.shape(values)[0])
    lengths *= apart
    mean = tf.reduce_sum(lengths) / tf.maximum(tf.reduce_sum(apart), 1.0)
    return lengths / tf.maximum(mean, 1e-12)


def _angles(values):
    """Cosines of the angles at each example between every two others, (batch, batch, batch)."""
    towards = values[None] - values[:, None]
    towards = tf.math.l2_normalize(towards, axis=-1, epsilon=1e-12)
    return tf.matmul(towards, towards, transpose_b=True)


def _huber(expected, found):
    error = tf.abs(expected - found)
    return tf.reduce_mean(tf.where(error <= 1.0, 0.5 * tf.square(error), error - 0.5))
