"""From logits to tokens: the rules of the requests, the filters, the noise."""
