"""AdaMixer on MMDetection: data preprocessor, neck, initial queries, sampling, mixing, stage, decoder, detector."""

from .data_preprocessor import NonBlockingDetDataPreprocessor
from .decoder import AdaMixerDecoder
from .detector import QueryBased
from .neck import ChannelMapping
from .query_generator import InitialQueryGenerator
from .stage import AdaMixerDecoderStage

__all__ = [
    "AdaMixerDecoder",
    "AdaMixerDecoderStage",
    "ChannelMapping",
    "InitialQueryGenerator",
    "NonBlockingDetDataPreprocessor",
    "QueryBased",
]
