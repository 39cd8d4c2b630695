"""The stream of steps as a pure function of indexes: mixture, order, packing, plan."""
