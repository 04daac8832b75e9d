"""The embeddings there are, by name."""

from trainer.config.graph import GraphKind, GraphModelConfig
from trainer.knowledge_graph.base import GraphModel
from trainer.knowledge_graph.complex import ComplEx
from trainer.knowledge_graph.distmult import DistMult
from trainer.knowledge_graph.rotate import RotatE
from trainer.knowledge_graph.transe import TransE
from trainer.knowledge_graph.transh import TransH
from trainer.knowledge_graph.transr import TransR

MODELS: dict[GraphKind, type[GraphModel]] = {
    "transe": TransE,
    "transh": TransH,
    "transr": TransR,
    "distmult": DistMult,
    "complex": ComplEx,
    "rotate": RotatE,
}


def build_graph_model(config: GraphModelConfig) -> GraphModel:
    return MODELS[config.kind](config)
