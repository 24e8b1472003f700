"""The parts of a decoder layer, each a function of its weights, memory and a step's rows; and walks over all layers."""
