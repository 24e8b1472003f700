"""An attention worker's memory: its budget, its pages and slots, and who holds them."""
