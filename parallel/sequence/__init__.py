"""Token mixing over a sequence that may be spread over ranks, one file per algorithm.

A mixer calls these with its context and never asks how many ranks there are. Every algorithm is
written against `SequenceLayout`; on one rank it is the operator itself on the layout's documents.
Rows before the tokens may hold sink tokens: they see each other, and every token sees them.
"""

from parallel.sequence.attention import attention as attention
from parallel.sequence.context import SequenceContext as SequenceContext
from parallel.sequence.recurrent import delta_rule as delta_rule
from parallel.sequence.recurrent import linear_attention as linear_attention
from parallel.sequence.short_conv import short_conv as short_conv
