"""How leaderboards rank and correlations are read, in the words that stand beside them."""

from __future__ import annotations

LAYER_RULE = (
    "Layers are listed by the lower end of the interval of their mean accuracy drop, which holds "
    "for all layers together and decides what is shown: a layer matters where it is above 0. Ranks "
    "are by mean accuracy relevance (1 = removing the layer takes the model down to chance, 0 = no "
    "change, negative = removal helps). Each benchmark counts alike and once; only layers measured "
    "on all of them have a rank."
)


INTERVAL_RULE = (
    "Intervals (95 %) say what other documents of the same benchmarks would give, not what other "
    "benchmarks would. Where ranks overlap, the order is open."
)


MODEL_RULE = (
    "Models are ranked by their mean accuracy relevance over all layers, the lowest first: the "
    "less the removal of one layer hurts, the more robust the model. They are compared on the "
    "benchmarks, documents and settings that most models share; a model that lacks one of these, "
    "or one of its own layers there, has no rank."
)


CORRELATION_RULE = (
    "The interval over documents says where the coefficient would be with other documents and the "
    "same layers. p over layers says how often two unrelated series of layers, each as smooth over "
    "depth, would correlate as strongly. One may be clear where the other is not."
)


EXPERT_RULE = (
    "The interval over documents says where the coefficient would be with other documents and the "
    "same experts. p within layers says how often the proxies of each layer's experts, dealt anew "
    "among them, would order the experts as well, or as badly. Experts of which a figure is "
    "undefined are left out."
)
