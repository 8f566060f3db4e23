"""The alphabet: one letter per axis, the same in every file.

    B  sequences in the batch        T  tokens per sequence      S  tokens a query may look back on
    D  width of the model            H  query heads              G  key/value heads
    K  width of one head             F  middle width of the ffn  V  vocabulary
    N  steps of the loop             E  experts                  R  rank of a low-rank factor
    W  width of a cache entry        M  rows of a flattened batch (B*T, or B*T*top_k)

People read these annotations always, the type checker while writing, and beartype under pytest;
outside the tests they cost nothing.
"""

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

Tokens = Int[Tensor, "B T"]
Positions = Int[Tensor, "B T"]  # a position below zero marks padding
Hidden = Float[Tensor, "B T D"]
Features = Float[Tensor, "B T D"]
Logits = Float[Tensor, "B T V"]
PerToken = Float[Tensor, "B T"]
Steps = Int[Tensor, "B"]  # how deep each sequence is in the loop
PerSequence = Bool[Tensor, "B"]
Rows = Int[Tensor, "B"]  # which row of the cache each row of the batch belongs to

Queries = Float[Tensor, "B H T K"]
Keys = Float[Tensor, "B G S K"]
Values = Float[Tensor, "B G S Kv"]
Mixed = Float[Tensor, "B H T Kv"]
Mask = Bool[Tensor, "#B #H T S"]  # true where a query may look
CacheEntry = Num[Tensor, "B ... W"]  # tokens on the axis before the last
