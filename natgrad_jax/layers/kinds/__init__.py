"""One file a layer kind: how one call of a layer becomes rows; ``base.py`` says what is asked."""
