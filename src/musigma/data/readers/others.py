"""Formats that are not read, and how to convert them."""

from __future__ import annotations

__all__ = ["conversion"]

TABLE = "save it as .csv or .parquet, such as by pandas."
ARRAYS = "save an array as .npy, or arrays x and y as .npz, such as by "
LEVELS = "save slices as .png, or an array of 8-bit levels as .npy, such as by "
CONVERSIONS = {
    ".xlsx .xls .xlsm .ods": f"{TABLE}read_excel",
    ".sas7bdat .xpt": f"{TABLE}read_sas",
    ".dta": f"{TABLE}read_stata",
    ".sav .por": f"{TABLE}read_spss",
    ".json .jsonl .ndjson": f"{TABLE}read_json",
    ".xml": f"{TABLE}read_xml",
    ".html": f"{TABLE}read_html",
    ".orc": f"{TABLE}read_orc",
    ".db .sqlite .sqlite3": f"{TABLE}read_sql",
    ".rds .rdata .rda": "in R, write.csv(x, file, row.names = FALSE)",
    ".arff": "save it as .csv, such as by scipy.io.arff.loadarff",
    ".h5 .hdf5 .hdf .he5": f"{ARRAYS}h5py",
    ".mat": f"{ARRAYS}scipy.io.loadmat",
    ".zarr": f"{ARRAYS}zarr.open",
    ".nc .nc4 .grib": f"{ARRAYS}xarray.open_dataset",
    ".pt .pth .ckpt .safetensors": f"{ARRAYS}numpy.savez(file, x=x.numpy())",
    ".pkl .pickle .joblib": "reading it may run code: save arrays as .npz, frames as .parquet",
    ".tfrecord .tfrecords .lmdb .mdb": "save images as files in a folder or a .tar",
    ".dcm .dicom": f"{LEVELS}pydicom",
    ".nii .mgz .nrrd .mha": f"{LEVELS}nibabel or SimpleITK",
    ".fits .fit .fts": f"{LEVELS}astropy.io.fits; save tables as .csv",
    ".czi .lif .nd2 .svs .ndpi": "save tiles as .png or .jpg",
    ".heic .heif .svg .cr2 .nef .arw .dng": "save it as .png or .jpg",
    ".mp4 .avi .mov .mkv .webm": "save frames as .png or .jpg, such as by ffmpeg",
    ".wav .mp3 .flac": "save features of equal length as a table, .npy or .parquet",
    ".7z .rar": "unpack it, and give the folder",
}
HOW = {suffix: how for suffixes, how in CONVERSIONS.items() for suffix in suffixes.split()}


def conversion(name: str) -> str | None:
    """How to convert a file of a format that is not read; None if nothing is known of it.

    >>> conversion("table.dta.gz")
    '.dta files are not read: save it as .csv or .parquet, such as by pandas.read_stata'
    >>> conversion("x.npy.gz"), conversion("x.unknown")
    ('it is compressed: gunzip it, and give the .npy file', None)
    """
    stem = name.lower()
    packed = stem.endswith((".gz", ".bz2", ".xz", ".zst"))
    stem = stem.rpartition(".")[0] if packed else stem
    suffix = "." + stem.rpartition(".")[2]
    if suffix in HOW:
        return f"{suffix} files are not read: {HOW[suffix]}"
    if packed and suffix in (".npy", ".npz", ".parquet", ".arrow", ".feather"):
        return f"it is compressed: gunzip it, and give the {suffix} file"
    return None
