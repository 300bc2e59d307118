"""What an answer is worth: every measure by its name.

Numbers are fractions, 0 to 1, but for BLEU and chrF, which are 0 to 100 as sacrebleu has them.
"""
from jaxlm.measure import candidates, labels, numbers, texts

METRICS = {metric.name: metric for metric in (
    *labels.METRICS, *numbers.METRICS, *texts.METRICS, *candidates.METRICS)}
