"""What a rank takes of memory besides the values of the checkpoint, known before anything is loaded."""
