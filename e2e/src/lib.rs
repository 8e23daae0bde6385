//! Labs, test guests, judges and fault tools.
