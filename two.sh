OMP_NUM_THREADS=1 python /tmp/w/st2.py 'batch=16' & OMP_NUM_THREADS=1 python /tmp/w/st2.py 'batch=16' ; wait
python /tmp/w/st2.py 'batch=32'
