"""How one node's tree becomes a message: sparsifiers, quantisers and wrappers.

A count is an int (entries) or a float in (0, 1] (a fraction of the length), so ``1``
keeps one entry and ``1.0`` keeps all. Every compressor takes any tree of real arrays
and treats it as one vector; :func:`per_leaf` and :func:`low_rank` treat each leaf by
itself.
"""

from dbojax.compressors.blocks import block_top_k as block_top_k
from dbojax.compressors.blocks import chunked_top_k as chunked_top_k
from dbojax.compressors.largest import keep_largest as keep_largest
from dbojax.compressors.lift import on_trees as on_trees
from dbojax.compressors.lift import per_leaf as per_leaf
from dbojax.compressors.lift import stateless as stateless
from dbojax.compressors.low_rank import low_rank as low_rank
from dbojax.compressors.noise import counter_uniform as counter_uniform
from dbojax.compressors.quantised import cast as cast
from dbojax.compressors.quantised import identity as identity
from dbojax.compressors.quantised import qsgd as qsgd
from dbojax.compressors.quantised import sign as sign
from dbojax.compressors.rounding import int8 as int8
from dbojax.compressors.rounding import natural as natural
from dbojax.compressors.sparse import random_k as random_k
from dbojax.compressors.sparse import strided_random_k as strided_random_k
from dbojax.compressors.sparse import top_k as top_k
from dbojax.compressors.wrappers import composed as composed
from dbojax.compressors.wrappers import multi_step as multi_step
from dbojax.compressors.wrappers import scaled as scaled
