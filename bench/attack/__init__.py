"""What can be read of a conversation from outside rank 0: attacks as programs, which docs/threat-model.md cites.

An attack sees recorded bytes and what is public: the model's files, and this program. Either the messages of one rank as MPI
handed them to its process (`record`), or the frames between two machines (`frames`). It is told what `--wire` was.

`rows` finds rows of the embedding table, `answer` the next token in the sums, `vocabulary` the tokens in what comes after
layer k. `table` has ten conversations, runs them and says how much each attack gets, of plain links and sealed ones.
"""
