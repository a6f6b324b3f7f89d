"""Sequential group composition: the product of k elements of a finite group, learnt from one orbit of a template."""
