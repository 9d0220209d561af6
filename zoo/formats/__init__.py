"""Files of weights: safetensors, torch's, TensorFlow's and Orbax's, read and written without their frameworks."""
