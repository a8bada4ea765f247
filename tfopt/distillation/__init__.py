"""Knowledge distillation: what a network may learn from the answers and the features of others.

settings: what a recipe says, read without TensorFlow. losses: the formulas. features: which layers stand for which, and
what they answer in a training step. teachers: models beside the study's own. students: the networks that learn. hook:
all of it as one loss for tfopt.training.fit, for keras and tf_keras alike. riding: beside the fine-tuning of any step.
frozen: a teacher for the process in which TFMOT trains.
"""
