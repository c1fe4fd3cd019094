"""Exchange with MATLAB and GNU Octave: networks, designs and certificates as `.mat` files.

The functions in `matlab_compat/` read what `export_mat` writes: `check_certificate.m` recomputes
the norms of the weights and proves the claims again. What `save_design.m` writes, `import_mat`
reads. `import_network` reads matrices and biases that another tool wrote.
"""

from tf_lyapunov.matlab.content import MatFile
from tf_lyapunov.matlab.exporting import export_mat, map_record
from tf_lyapunov.matlab.foreign import ForeignNetwork, import_network
from tf_lyapunov.matlab.importing import import_mat
from tf_lyapunov.matlab.memories import export_memory
from tf_lyapunov.matlab.regions import export_region

__all__ = [
    "ForeignNetwork",
    "MatFile",
    "export_mat",
    "export_memory",
    "export_region",
    "import_mat",
    "import_network",
    "map_record",
]
