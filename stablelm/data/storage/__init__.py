"""Opening and reading bytes wherever they are stored: local disks, web servers, object stores, the hub."""
