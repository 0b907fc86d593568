-- Monthly partitions by id. What belongs to a payment goes by the payment's id, everything else by its own.

create or replace view surety.partitioned_tables as
select
    listed.parent::regclass as parent,
    listed.prefix
from (
    values
    ('surety.payments', 'pay'), ('surety.steps', 'pay'), ('surety.calls', 'pay'), ('surety.facts', 'pay'),
    ('surety.expectations', 'pay'), ('surety.inbox', 'whk'), ('ledger.transfers', 'pst'), ('outbox.events', 'evt'),
    ('audit.entries', 'aud')
) as listed (parent, prefix);
comment on view surety.partitioned_tables is
'Tables kept in monthly partitions, and the prefix of the ids that decide the month.';

create or replace function surety.maintain_partitions(p_months_ahead integer default 3) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Makes this month's partitions and those of the months ahead, as tables that are then attached (which hardly locks the
-- parent), with the keys between siblings. The very first partition begins before all time. Returns how many were made.
-- Safe to repeat and to race.
declare
    v_table record;
    v_month timestamp;
    v_this timestamp := date_trunc('month', surety.time_now() at time zone 'UTC');
    v_name text;
    v_from text;
    v_made integer := 0;
    v_key record;
begin
    perform pg_advisory_xact_lock(hashtext('surety.maintain_partitions'));
    for v_table in
        select parent, prefix, n.nspname, c.relname
        from surety.partitioned_tables
        join pg_class c on c.oid = parent join pg_namespace n on n.oid = c.relnamespace
    loop
        for v_month in select generate_series(v_this, v_this + make_interval(months => p_months_ahead), '1 month') loop
            v_name := v_table.relname || to_char(v_month, '_YYYYMM');
            continue when to_regclass(format('%I.%I', v_table.nspname, v_name)) is not null;
            v_from := case
                when exists (select from pg_inherits where inhparent = v_table.parent)
                    then quote_literal(surety.id_at(v_table.prefix, v_month at time zone 'UTC'))
                else 'minvalue'
            end;
            execute format(
                'create table %1$I.%2$I (like %1$I.%3$I including defaults including generated including constraints)',
                v_table.nspname, v_name, v_table.relname);
            execute format(
                'alter table %1$I.%3$I attach partition %1$I.%2$I for values from (%4$s) to (%5$L)',
                v_table.nspname, v_name, v_table.relname, v_from,
                surety.id_at(v_table.prefix, (v_month + interval '1 month') at time zone 'UTC'));
            v_made := v_made + 1;
        end loop;
    end loop;
    for v_key in
        select
            k.name, k.columns, k.parent_columns, k.is_deferred, child.oid::regclass as child,
            parent.oid::regclass as parent
        from surety.sibling_keys as k
        join pg_inherits as i on i.inhparent = ('surety.' || k.child)::regclass
        join pg_class as child on child.oid = i.inhrelid
        join pg_class as parent on parent.relnamespace = 'surety'::regnamespace
            and parent.relname = k.parent || right(child.relname, 7)
        where not exists (select from pg_constraint as c where c.conrelid = child.oid and c.conname = k.name)
    loop
        execute format(
            'alter table %s add constraint %I foreign key (%s) references %s (%s) %s',
            v_key.child, v_key.name, v_key.columns, v_key.parent, v_key.parent_columns,
            case when v_key.is_deferred then 'deferrable initially deferred' end);
    end loop;
    return v_made;
end;
$$;

select surety.maintain_partitions();
