"""Training data: from files to packed batches, with a state to resume from.

sources.py   JSONL, CSV, Parquet, Hugging Face datasets -> rows, each with the place it came from
rows.py      a row, by its columns -> a document: tokens, and which of them carry loss
store.py     documents on disk, memory-mapped: the cache of a tokenised source, and shards for pre-training
pack.py      documents -> pieces that fit a row, pieces -> rows; plain arithmetic on lengths
batch.py     rows -> Batch: tokens, targets, weights, positions, document numbers
loader.py    Loader: Iterator[Batch] over a store
stream.py    Stream: Iterator[Batch] over text that is tokenised as it is read
"""
