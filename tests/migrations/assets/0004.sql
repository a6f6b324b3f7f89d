BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0004');
CREATE TABLE artifacts (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	kind TEXT NOT NULL, 
	step BIGINT, 
	path TEXT NOT NULL, 
	bytes BIGINT NOT NULL, 
	sha256 TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id)
);
INSERT INTO "artifacts" VALUES(1,1,'checkpoint',5,'a.pt',1,'x');
INSERT INTO "artifacts" VALUES(2,1,'checkpoint_best',5,'a.pt',1,'x');
CREATE TABLE attempts (
	run_id INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	worker TEXT NOT NULL, 
	host TEXT NOT NULL, 
	device TEXT NOT NULL, 
	started_at DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	ended TEXT, 
	cause TEXT, 
	message TEXT, 
	traceback TEXT, 
	step_from BIGINT, 
	step_to BIGINT, 
	git_commit TEXT, 
	git_dirty BOOLEAN, 
	command_line TEXT NOT NULL, 
	versions TEXT, 
	numerics TEXT, 
	exact BOOLEAN, 
	source_sha256 TEXT, summary TEXT, 
	PRIMARY KEY (run_id, attempt), 
	CONSTRAINT ck_attempts_how CHECK (ended IS NULL OR ended IN ('done', 'failed', 'released', 'lost', 'cancelled')), 
	CONSTRAINT ck_attempts_ended CHECK ((ended IS NULL) = (ended_at IS NULL)), 
	FOREIGN KEY(run_id) REFERENCES runs (id), 
	FOREIGN KEY(worker) REFERENCES workers (id)
)
 WITHOUT ROWID

;
INSERT INTO "attempts" VALUES(1,1,'w','testhost','cpu',1000.0,2000.0,'lost','lost','worker w was lost: no heartbeat; the lease ended 940.0 s before',NULL,NULL,5,NULL,NULL,'pytest','{}',NULL,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES(1,2,'w','testhost','cpu',1.79534346099999094015e+09,1.79534346100699162477e+09,'done',NULL,NULL,NULL,NULL,10,NULL,NULL,'pytest','{}',NULL,NULL,NULL,'{"loss":0.1,"note":"na\u00efve"}');
INSERT INTO "attempts" VALUES(2,1,'w','testhost','cpu',1.79534346100900316241e+09,1.79534346101298618314e+09,'failed','bug','x','trace',NULL,1,NULL,NULL,'pytest','{}',NULL,NULL,NULL,NULL);
CREATE TABLE changes (
	id INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	verb TEXT NOT NULL, 
	detail TEXT NOT NULL, 
	host TEXT NOT NULL, 
	command_line TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "changes" VALUES(1,0.0,'cancel','{}','h','rnnq');
CREATE TABLE gates (
	id INTEGER NOT NULL, 
	stage TEXT NOT NULL, 
	condition TEXT NOT NULL, 
	decision TEXT, 
	seen TEXT, 
	decided_at DOUBLE, 
	PRIMARY KEY (id), 
	FOREIGN KEY(stage) REFERENCES stages (name)
);
INSERT INTO "gates" VALUES(1,'next','{}',NULL,NULL,NULL);
CREATE TABLE intakes (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	stage TEXT NOT NULL, 
	complete BOOLEAN DEFAULT 0 NOT NULL, 
	host TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	pid_start TEXT, 
	beat_at DOUBLE NOT NULL, removing BOOLEAN DEFAULT 0 NOT NULL, 
	FOREIGN KEY(stage) REFERENCES stages (name)
);
INSERT INTO "intakes" VALUES(1,'s',1,'testhost/0/0',4913,'2420322',1.79534346097001743314e+09,0);
INSERT INTO "intakes" VALUES(2,'next',1,'testhost/0/0',4913,'2420322',1.79534346104199433328e+09,0);
CREATE TABLE lineage (
	child INTEGER NOT NULL, 
	parent INTEGER NOT NULL, 
	kind TEXT NOT NULL, 
	detail TEXT, 
	PRIMARY KEY (child, parent, kind), 
	CONSTRAINT ck_lineage_kind CHECK (kind IN ('promote', 'extend', 'retry', 'continue', 'probe')), 
	FOREIGN KEY(child) REFERENCES runs (id), 
	FOREIGN KEY(parent) REFERENCES runs (id)
)
 WITHOUT ROWID

;
INSERT INTO "lineage" VALUES(5,1,'promote','{"rank":1}');
CREATE TABLE metrics (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "metrics" VALUES(1,'loss');
INSERT INTO "metrics" VALUES(2,'other');
CREATE TABLE packs (
	shape TEXT NOT NULL, 
	members INTEGER NOT NULL, 
	equal BOOLEAN, 
	rate DOUBLE, 
	fits BOOLEAN NOT NULL, 
	found_at DOUBLE NOT NULL, 
	PRIMARY KEY (shape, members)
)
 WITHOUT ROWID

;
INSERT INTO "packs" VALUES('{}',8,1,100.0,1,1.79534346105301833153e+09);
CREATE TABLE point (
	run_id INTEGER NOT NULL, 
	metric_id INTEGER NOT NULL, 
	step BIGINT NOT NULL, 
	value DOUBLE, 
	PRIMARY KEY (run_id, metric_id, step), 
	FOREIGN KEY(metric_id) REFERENCES metrics (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
 WITHOUT ROWID

;
INSERT INTO "point" VALUES(1,1,1,1.0);
INSERT INTO "point" VALUES(1,1,2,0.5);
INSERT INTO "point" VALUES(1,1,3,3.33333333333333314829e-01);
INSERT INTO "point" VALUES(1,1,4,0.25);
INSERT INTO "point" VALUES(1,1,5,0.2);
INSERT INTO "point" VALUES(1,1,10,NULL);
INSERT INTO "point" VALUES(2,2,1,1.5);
CREATE TABLE "runs" (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	stage TEXT NOT NULL, 
	intake INTEGER NOT NULL, 
	family TEXT NOT NULL, 
	label TEXT NOT NULL, 
	config TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	group_key TEXT NOT NULL, 
	seed BIGINT, 
	state TEXT NOT NULL, 
	wish TEXT, 
	wake_at DOUBLE, 
	priority INTEGER DEFAULT 0 NOT NULL, 
	pack_key TEXT, 
	attempt INTEGER DEFAULT 0 NOT NULL, 
	failures INTEGER DEFAULT 0 NOT NULL, 
	lost INTEGER DEFAULT 0 NOT NULL, 
	worker TEXT, 
	lease_until DOUBLE, 
	budget BIGINT, 
	steps_done BIGINT DEFAULT 0 NOT NULL, 
	summary TEXT, 
	loss DOUBLE, 
	checkpoint TEXT, 
	checkpoint_prev TEXT, 
	checkpoint_best TEXT, 
	cause TEXT, 
	message TEXT, 
	source TEXT, 
	source_sha256 TEXT, 
	created_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	ended_at DOUBLE, 
	note TEXT, 
	CONSTRAINT ck_runs_leased CHECK ((state = 'running') = (lease_until IS NOT NULL)), 
	CONSTRAINT ck_runs_owned CHECK ((state = 'running') = (worker IS NOT NULL)), 
	CONSTRAINT ck_runs_ended CHECK ((state IN ('done', 'failed', 'cancelled', 'skipped')) = (ended_at IS NOT NULL)), 
	CONSTRAINT ck_runs_state CHECK (state IN ('waiting', 'pending', 'running', 'done', 'failed', 'cancelled', 'skipped')), 
	CONSTRAINT ck_runs_wish CHECK (wish IS NULL OR wish IN ('cancel', 'pause')), 
	CONSTRAINT ck_runs_counters CHECK (attempt >= 0 AND failures >= 0 AND lost >= 0), 
	CONSTRAINT ck_runs_steps CHECK (steps_done >= 0), 
	FOREIGN KEY(intake) REFERENCES intakes (id), 
	FOREIGN KEY(stage) REFERENCES stages (name), 
	FOREIGN KEY(worker) REFERENCES workers (id), 
	UNIQUE (stage, fingerprint)
);
INSERT INTO "runs" VALUES(1,'s',1,'f','run0','{"seed":0}','f0','g',0,'done',NULL,NULL,0,NULL,2,0,0,NULL,NULL,10,10,'{"loss":0.1,"note":"na\u00efve"}',0.1,'{"bytes":1,"path":"a.pt","sha256":"x","step":5}',NULL,'{"bytes":1,"path":"a.pt","sha256":"x","step":5}',NULL,NULL,NULL,NULL,1.79534346094800972932e+09,1000.0,1.79534346100497984883e+09,NULL);
INSERT INTO "runs" VALUES(2,'s',1,'f','run1','{"seed":1}','f1','g',1,'failed',NULL,NULL,0,NULL,1,1,0,NULL,NULL,10,1,NULL,NULL,NULL,NULL,NULL,'bug','x',NULL,NULL,1.79534346094800972932e+09,1.79534346100900316241e+09,1.79534346101198053358e+09,NULL);
INSERT INTO "runs" VALUES(3,'s',1,'f','run2','{"seed":2}','f2','g',2,'pending',NULL,NULL,0,NULL,0,0,0,NULL,NULL,10,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1.79534346094800972932e+09,NULL,NULL,NULL);
INSERT INTO "runs" VALUES(4,'s',1,'f','run3','{"seed":3}','f3','g',3,'pending',NULL,NULL,0,NULL,0,0,0,NULL,NULL,10,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1.79534346094800972932e+09,NULL,NULL,NULL);
INSERT INTO "runs" VALUES(5,'next',2,'f','run0','{"seed":0}','f0','g',0,'pending',NULL,NULL,0,NULL,0,0,0,NULL,NULL,10,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1.79534346101998686789e+09,NULL,NULL,NULL);
CREATE TABLE stages (
	name TEXT NOT NULL, 
	family TEXT NOT NULL, 
	version INTEGER NOT NULL, 
	family_in_source BOOLEAN NOT NULL, 
	has_rule BOOLEAN NOT NULL, 
	source TEXT, 
	source_sha256 TEXT, 
	command_line TEXT NOT NULL, 
	fields TEXT NOT NULL, 
	metrics TEXT NOT NULL, 
	seed_fields TEXT NOT NULL, 
	data TEXT NOT NULL, 
	paused BOOLEAN DEFAULT 0 NOT NULL, 
	created_at DOUBLE NOT NULL, defined_as TEXT, keep TEXT, 
	PRIMARY KEY (name)
);
INSERT INTO "stages" VALUES('s','f',1,0,0,NULL,NULL,'-','{"seed": "int"}','[{"better":"min","name":"loss","primary":true,"unit":"nats"}]','["seed"]','{}',0,1.79534346093799161911e+09,NULL,NULL);
INSERT INTO "stages" VALUES('next','f',1,0,0,NULL,NULL,'-','{"seed": "int"}','[{"better":"min","name":"loss","primary":true,"unit":"nats"}]','["seed"]','{}',0,1.79534346101700973512e+09,NULL,NULL);
CREATE TABLE study (
	id TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	lease_s DOUBLE NOT NULL, 
	root TEXT, 
	PRIMARY KEY (id)
);
INSERT INTO "study" VALUES('a0ba7944-e9de-4c2a-84ca-3a58a33d1b9b',1.79534346092298483844e+09,60.0,NULL);
CREATE TABLE tags (
	run_id INTEGER NOT NULL, 
	tag TEXT NOT NULL, 
	PRIMARY KEY (run_id, tag), 
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
 WITHOUT ROWID

;
INSERT INTO "tags" VALUES(1,'good');
CREATE TABLE workers (
	id TEXT NOT NULL, 
	host TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	pid_start TEXT, 
	device TEXT NOT NULL, 
	scope TEXT, 
	command_line TEXT NOT NULL, 
	state TEXT NOT NULL, 
	message TEXT, 
	started_at DOUBLE NOT NULL, 
	beat_at DOUBLE NOT NULL, 
	left_at DOUBLE, wish TEXT, 
	PRIMARY KEY (id), 
	CONSTRAINT ck_workers_left CHECK ((state = 'live') = (left_at IS NULL)), 
	CONSTRAINT ck_workers_state CHECK (state IN ('live', 'left', 'lost'))
);
INSERT INTO "workers" VALUES('w','testhost/0/0',4913,'2420322','cpu','{}','-','left','done',1.79534346098100090023e+09,1.79534346098100090023e+09,1.79534346105100655558e+09,NULL);
CREATE INDEX ix_workers_live ON workers (host) WHERE state = 'live';
CREATE INDEX ix_intakes_stage ON intakes (stage, complete);
CREATE INDEX ix_artifacts_run ON artifacts (run_id);
CREATE INDEX ix_lineage_parent ON lineage (parent);
CREATE VIEW points AS
        SELECT point.run_id AS run_id, metrics.name AS name, point.step AS step, point.value AS value
        FROM point JOIN metrics ON metrics.id = point.metric_id;
CREATE UNIQUE INDEX ix_intakes_open ON intakes (stage) WHERE NOT complete AND NOT removing;
CREATE INDEX ix_runs_claim ON runs (intake, stage, priority DESC, id) WHERE state = 'pending';
CREATE INDEX ix_runs_claim_pack ON runs (intake, stage, pack_key, priority DESC, id) WHERE state = 'pending';
CREATE INDEX ix_runs_count ON runs (intake, stage, state);
CREATE INDEX ix_runs_ended ON runs (stage, ended_at);
CREATE INDEX ix_runs_group ON runs (stage, group_key);
CREATE INDEX ix_runs_lease ON runs (lease_until) WHERE state = 'running';
CREATE INDEX ix_runs_loss ON runs (stage, loss);
CREATE INDEX ix_runs_wake ON runs (wake_at) WHERE state = 'waiting';
CREATE INDEX ix_runs_worker ON runs (worker) WHERE state = 'running';
CREATE INDEX ix_tags_tag ON tags (tag);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('runs',5);
INSERT INTO "sqlite_sequence" VALUES('intakes',2);
COMMIT;
