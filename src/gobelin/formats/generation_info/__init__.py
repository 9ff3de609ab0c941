"""Settings that programs stored in their images; a program is one file, or an entry of one."""
