"""Audio to text, greedily: the one decoder that every stage translates with.

`translate_clips.py` is the entrance. `decoder.py` runs the layers, `loop.py` repeats the decoding step until every answer has
ended, and `cuda_graphs.py` is that step on a GPU. `ragged.py` and `slots.py` say where tokens of rows of unlike length stand.
`attention.py` and `shared_prompts.py` are the attention of a decoding step.

Five indices occur everywhere, and each has one name:

* `row`: which prompt of the batch, together with the answer that grows behind it. Rows are numbered once and never move.
* `position`: which token of its row, counted from 0 at the prompt's first token.
* `slot`: which line of the tensors that hold keys and values. A row owns the slots from `start[row]` on, one per position:
  slot = start[row] + position.
* `entry`: which line of the batch that a decoding step runs over. Each stands for a row. On a GPU, entries that go on are moved to
  the front, and slots stay. On a CPU, entries that have ended are dropped, and the slots of the others are copied to new tensors.
* `place`: an entry's number among the entries that share a prompt in a layer, sorted by prompt. -1: the entry shares none there.

Example: the layer search translates two clips with the prompts "a b c" and "d e". Candidate 1 lacks layer 1 and candidate 2 lacks
layer 3. Answers have at most 2 tokens, written W X Y Z.

    row 0   clip 0, without layer 1   a b c W .
    row 1   clip 1, without layer 1   d e X .
    row 2   clip 0, without layer 3   a b c Y .
    row 3   clip 1, without layer 3   d e Z .

    row        0               1            2                3             prompts, once for all    nobody's
    slot       0  1  2  3  4   5  6  7  8   9 10 11 12 13   14 15 16 17    18 19 20    21 22        23
    position   0  1  2  3  4   0  1  2  3   0  1  2  3  4    0  1  2  3     0  1  2     0  1
    token      a  b  c  W  .   d  e  X  .   a  b  c  Y  .    d  e  Z  .     a  b  c     d  e

Below layer 1 all rows read their prompt in slots 18 to 22. In layers 1 and 2 rows 2 and 3 still do; rows 0 and 1 read their own slots.
Row 0 has ended, so its entry was moved behind the others:

    entry                              0   1   2   3
    row                                1   2   3   0
    prompt                             1   0   1   0
    place in layer 0 (all share)       2   0   3   1      entries by place: 1 3 (prompt 0), 0 2 (prompt 1)
    place in layer 2 (rows 2, 3)      -1   0   1  -1      entries by place: 1 (prompt 0), 2 (prompt 1)

While whole prompts are run (`ragged.py`) two more occur. `packed_index` numbers the tokens of all rows, one row after the other.
`computed_index` numbers only those that are computed: a row that begins like the row before it takes the beginning from there.

    row              0      1          rows "a b c" and "a b d e": "a b" is computed once
    token            a b c  a b d e
    packed_index     0 1 2  3 4 5 6
    computed_index   0 1 2  0 1 3 4

A layer is named by its index in the model that is loaded, `layer`. Leaving a layer out does not renumber the others.
"""
