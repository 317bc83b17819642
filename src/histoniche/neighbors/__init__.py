"""Engine: neighbourhoods of cells, arrays in and arrays out."""
