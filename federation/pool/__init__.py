"""The pool of low-rank units: its shape, its layers (PEFT tuner machinery) and how a block of users is bound."""
